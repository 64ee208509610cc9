"""Low-rank adapters beside frozen weights."""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import ConfigError, schema, setting
from trainer.data.hub import folder_of
from trainer.models.adapter import Adapter, Full
from trainer.models.architecture import Architecture
from trainer.models.dropout import dropout
from trainer.models.families import FAMILIES
from trainer.models.grouped import GroupedLinear
from trainer.models.hf_format import FormatError
from trainer.models.linear import LowRank, WeightProduct, summed
from trainer.models.lora_experts import LoRAGroupedLinear, from_peft, to_peft
from trainer.models.packed import PackedLinear
from trainer.models.peft_format import AdapterFolder, Settings
from trainer.models.transformer import Transformer
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import UNDIVIDED, Axis

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"]
ADAPTABLE = (nn.Linear, PackedLinear, GroupedLinear)
EMBEDDINGS = ("embed_tokens", "lm_head")


@schema("adapter/lora")
@dataclass
class LoRA(Adapter):
    """Low-rank adapters: ``W x + scale * B A x`` with W frozen (Hu et al. 2021, arXiv:2106.09685)."""

    # Adapters want about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
    rate: ClassVar[float] = 10.0
    freezes_model: ClassVar[bool] = True
    base_format: ClassVar[str | None] = None
    """What the frozen weights are held in, other than numbers of the compute format."""

    path: str | None = setting(
        None,
        "an adapter in PEFT's layout to start from; rank, alpha, rslora, targets are then the folder's, its full joins yours",
    )
    rank: int = setting(16, "rows of A and columns of B", least=1)
    alpha: float = setting(32.0, "the adapter is scaled by alpha / rank", above=0)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)")
    dropout: float = setting(0.0, "part of an adapter's inputs that is dropped in training", least=0, below=1)
    targets: list[str] = setting(
        lambda: list(PROJECTIONS), "linear layers by name or pattern: q_proj, *.self_attn.*, model.layers.1?.*"
    )
    full: list[str] = setting(
        list, "modules whose own weights are trained too: embed_tokens, lm_head, model.norm; patterns"
    )
    merge: bool = setting(True, "write export/ with the adapters merged into the weights, beside adapter/")

    def __post_init__(self) -> None:
        self.path = None if self.path is None else folder_of(self.path)
        if self.path is not None and (Path(self.path) / "adapter_config.json").is_file():
            try:
                settings = AdapterFolder(Path(self.path)).settings
            except FormatError:
                return  # problems() says it
            self.rank, self.alpha, self.rslora = settings.rank, settings.alpha, settings.rslora
            self.targets = list(settings.targets)
            self.full = list(dict.fromkeys([*self.full, *settings.full]))

    def problems(self) -> Iterator[str]:
        if self.path is not None:
            try:
                AdapterFolder(Path(self.path))
            except FormatError as error:
                yield f"adapter.path={self.path}: {error}"
        if not self.targets:
            yield f"adapter.targets=[] adapts nothing; name layers such as {', '.join(PROJECTIONS[:4])}"

    def remarks(self, architecture: Architecture) -> Iterator[str]:
        if self.path is not None and (kind := AdapterFolder(Path(self.path)).base_format) != self.base_format:
            yield (
                f"adapter.path={self.path} was trained beside {kind or 'plain'} weights and goes on beside "
                f"{self.base_format or 'plain'} ones, so that its loss begins elsewhere than it ended"
            )

    def validate_compiled(self) -> Iterator[str]:
        if self.dropout:
            yield (
                f"adapter.dropout={self.dropout:g} is drawn row by row, between graphs, so that model.compile=true compiles "
                "next to nothing; use adapter.dropout=0 or model.compile=false"
            )

    def validate_rounded(self) -> Iterator[str]:
        if self.dropout:
            yield (
                f"adapter.dropout={self.dropout:g} drops inputs of the adapter alone, and qat.bits rounds it merged into its "
                "weight; use adapter.dropout=0"
            )

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def validate_architecture(self, architecture: Architecture) -> None:
        with torch.device("meta"):
            model = Transformer(architecture)
        linears = [name for name, m in model.named_modules() if isinstance(m, ADAPTABLE)]
        stacks = [name for name, m in model.named_modules() if isinstance(m, GroupedLinear)]
        modules = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        problems = [
            f"adapter.targets: {pattern} matches no linear layer; there are {', '.join(PROJECTIONS)}"
            for pattern in unmatched(self.targets, linears)
            # The default: those of them that a model has. An adapter's own: its tensors are compared below.
            if self.targets != PROJECTIONS and self.path is None
        ]
        adapted = [name for name in stacks if matches(name, self.targets)]
        if adapted and not FAMILIES[architecture.family].peft_experts:
            problems.append(
                f"adapter.targets: PEFT's layout does not fit the experts of family {architecture.family}; name other "
                f"layers, such as adapter.targets=[{','.join(PROJECTIONS[:4])}]"
            )
        if adapted and self.dropout:
            problems.append(
                f"adapter.dropout={self.dropout:g} is drawn row by row, and experts see tokens in another order; use 0, or "
                "leave the experts' gate_up_proj and down_proj out of adapter.targets"
            )
        problems += [
            f"adapter.full: {pattern} matches no module with weights; there are embed_tokens, model.norm and others"
            for pattern in unmatched(self.full, modules)
        ]
        sizes = [max(m.weight.shape) for n, m in model.named_modules() if n in linears and matches(n, self.targets)]
        if sizes and self.rank > max(sizes):
            problems.append(
                f"adapter.rank={self.rank} is more than any side of a matrix it adapts; use at most {max(sizes)}"
            )
        both = [name for name in modules if matches(name, self.full) and matches(name, self.targets)]
        problems += [f"adapter.full and adapter.targets both name {both[0]}; leave it out of one"] if both else []
        family = FAMILIES[architecture.family]
        rules = {name: family.rule_of(f"{name}.weight")[1] for name in modules if matches(name, self.full)}
        problems += [
            f"adapter.full: {name} is a part of {rule.theirs[0]} in family {architecture.family}; leave it out"
            for name, rule in rules.items()
            if rule is not None and len(rule.ours) > 1
        ][:1]
        if self.path is not None and not problems:
            self.install(model, grown=False)
            own = to_peft({n: p for n, p in model.named_parameters() if is_adapter(n)})
            needed = {name: tuple(tensor.shape) for name, tensor in own.items()}
            problem = AdapterFolder(Path(self.path)).shape_problem(needed)
            problems += [f"adapter.path={self.path}: {problem}"] if problem else []
        if problems:
            raise ConfigError(problems)

    def trained(self, architecture: Architecture, grown: bool) -> int:
        with torch.device("meta"):
            model = Transformer(architecture)
            self.install(model, grown=grown)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def install(self, model: Transformer, *, grown: bool) -> None:
        model.requires_grad_(False)
        full = [*self.full, *(EMBEDDINGS if grown else ()), "score"]
        for name, module in list(model.named_modules()):
            if isinstance(module, ADAPTABLE) and matches(name, self.targets):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], self._adapted(module, name))
            elif matches(name, full):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)

    def _adapted(self, module: nn.Linear | PackedLinear | GroupedLinear, name: str) -> nn.Module:
        if isinstance(module, GroupedLinear):
            return LoRAGroupedLinear(module, self.rank, self.scale)
        return LoRALinear(module, self.rank, self.scale, self.dropout, name)

    def initial(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        if self.path is not None and (stored := AdapterFolder(Path(self.path)).tensor(name)) is not None:
            return from_peft(name, stored, shape[0])
        if not is_adapter(name):
            return None
        if name.endswith("lora_B.weight"):
            return torch.zeros(*shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # Kaiming-uniform with a = sqrt(5), as linear layers are born.
        return torch.empty(*shape).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=generator)

    def frozen_matrices(self, model: nn.Module) -> Iterator[nn.Parameter]:
        for module in model.modules():
            if isinstance(module, (*ADAPTABLE, LoRALinear, LoRAGroupedLinear)):
                yield from (p for p in module.parameters(recurse=False) if not p.requires_grad)

    def moves_reference(self, new_tokens: int) -> str | None:
        if self.path is not None:
            return f"adapter.path={self.path} is part of that policy"
        if self.full:
            return f"adapter.full=[{','.join(self.full)}] trains these weights, too"
        return f"tokenizer.add trains the embeddings, too, for {new_tokens} new tokens" if new_tokens else None

    @property
    def at_start(self) -> Adapter:
        return Full() if self.path is None else self

    @property
    def exports(self) -> bool:
        return self.merge

    def merged(self, name: str, trained: Mapping[str, Tensor], start: Callable[[str], Tensor]) -> Tensor:
        stem = name.removesuffix("weight")
        if f"{stem}lora_A.weight" not in trained:
            return trained[name] if name in trained else start(name)
        a, b = (trained[f"{stem}lora_{side}.weight"].float() for side in "AB")
        return LowRank(a, b, self.scale).added_to(start(name).to(a.device))

    def peft_settings(self, trained: Mapping[str, Tensor]) -> Settings:
        adapted = [n.removesuffix(".lora_A.weight") for n in trained if n.endswith(".lora_A.weight")]
        targets = [target for target in self.targets if any(matches(name, [target]) for name in adapted)]
        if not all(target.isidentifier() for target in targets):
            targets = adapted  # PEFT knows no patterns of names
        full = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in trained if not is_adapter(n)})
        return Settings(self.rank, self.alpha, self.rslora, tuple(targets), tuple(full), self.dropout)


class AdapterMatrix(nn.Linear):
    """One of an adapter's two matrices.

    Attributes:
        users: Ranks that hold all of it, and each use what it gives for a part of the outputs.
    """

    users: Axis = UNDIVIDED

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.users.enter(self.weight))


class LoRALinear(WeightProduct):
    """A frozen linear layer's own weight, packed or not, and beside it the product of two trained matrices of ``rank``."""

    def __init__(
        self, base: nn.Linear | PackedLinear, rank: int, scale: float, dropped: float = 0.0, place: str = ""
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = AdapterMatrix(base.in_features, rank, bias=False)
        self.lora_B = AdapterMatrix(rank, base.out_features, bias=False)
        self.scale, self.dropped, self.place = scale, dropped, place
        self.active = True

    def divide_outputs(self, axis: Axis) -> None:
        super().divide_outputs(axis)
        self.lora_A.users = axis
        cut(self.lora_B, "weight", 0, axis)

    def divide_inputs(self, axis: Axis) -> None:
        super().divide_inputs(axis)
        cut(self.lora_A, "weight", 1, axis)

    def forward(self, x: Tensor) -> Tensor:
        quantizer, weight = self.fake_quantizer, self.weight
        if self.active and isinstance(weight, Tensor) and quantizer is not None and quantizer.active:
            return quantizer.adapted_product(x, weight, self.bias, self.lora_A, self.lora_B, self.scale, self.inputs)
        out = summed(partial(self.product, x), self.bias, self.inputs)
        if not self.active:
            return out
        if self.training and self.dropped:
            x = dropout(x, self.dropped, self.place, self.inputs)
        return out + self.lora_B(self.inputs.leave(self.lora_A(x))) * self.scale  # type: ignore[no-any-return]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of the frozen weight alone."""
        if isinstance(self.weight, nn.Module):
            return self.weight(x, bias)  # type: ignore[no-any-return]
        return super().product(x, bias)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for a while: what the adapters add is left out."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear | LoRAGroupedLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The patterns that fit none of the names."""
    return [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's whole name, or its last part, fits one of the patterns."""
    last = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(last, p) for p in patterns)
