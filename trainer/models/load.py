"""Models from nothing or from a folder, parameter by parameter, whatever the ranks and the strategy."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import ConfigError, schema
from trainer.data.hub import absence, folder_of
from trainer.models.adapter import Adapter, Full
from trainer.models.architecture import Architecture
from trainer.models.attention import has_kernel
from trainer.models.balance import Balancer, BalanceRates, without_effect
from trainer.models.division import mesh_remarks
from trainer.models.families import problems_of
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, read_architecture
from trainer.models.initial import HEAD, initial
from trainer.models.linear import FakeQuantizer
from trainer.models.lora import is_adapter
from trainer.models.nf4 import Packed, pack, unpack
from trainer.models.options import ModelOptions
from trainer.models.packed import fill_packed, packed_weights
from trainer.models.peft_format import AdapterFolder
from trainer.models.qat import QAT, install
from trainer.models.quantized_base import remarks, validate_base
from trainer.models.recompute import Recompute
from trainer.models.shape import Shape, architecture_of, needless, stretched
from trainer.models.stage import keep_stage
from trainer.models.stored import StoredWeights
from trainer.models.transformer import Transformer
from trainer.parallel import distributed
from trainer.parallel.engine import saved_buffers
from trainer.parallel.malloc import long_lived_allocations
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""Parameters with a row for every token."""


@schema("model/transformer")
@dataclass(frozen=True)
class Model(Shape, ModelOptions):
    """The decoder: from scratch by its shape, or from a folder."""

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", folder_of(self.path))

    def problems(self) -> Iterator[str]:
        if self.path is None:
            a = architecture_of(self, self.vocab_size or 1)
            yield from problems_of(a)
            yield from needless(self)
            yield from self._router_problems(a)
            return
        if absent := absence(self.path):
            yield f"model.path={self.path}: {absent}"
            return
        try:
            architecture = self._of_folder(Path(self.path))
        except FormatError as error:
            yield f"model.path={self.path}: {error}"
            return
        yield from (f"{self.path}/config.json: {problem}" for problem in problems_of(architecture, ""))
        yield from self._router_problems(architecture)

    def _router_problems(self, a: Architecture) -> Iterator[str]:
        return without_effect(a, self.router_balance_loss, self.router_z_loss, self.router_bias_rate)

    def validate_adapter(self, adapter: Adapter) -> Iterator[str]:
        """One sentence for what does not work beside an adapter."""
        if adapter.freezes_model and self.router_bias_rate:
            yield (
                f"model.router_bias_rate={self.router_bias_rate:g} changes the routers, which an adapter freezes and does "
                "not export; leave it out, or use adapter=none"
            )
        if self.path is not None:
            yield from validate_base(self.path, adapter)

    def balancer(self, module: nn.Module, adapter: Adapter) -> Balancer | None:
        """What keeps the experts of a trained module busy alike; None where it has none."""
        default = 1e-3 if self.path is None and not adapter.freezes_model else 0.0
        loss, rate = (default if v is None else v for v in (self.router_balance_loss, self.router_bias_rate))
        balancer = Balancer(module, BalanceRates(loss, self.router_z_loss, rate))
        return balancer if balancer.routers else None

    def validate_compiled(self, device: torch.device, dtype: torch.dtype, a: Architecture) -> Iterator[str]:
        """One sentence for what does not work in compiled blocks that compute in ``dtype``."""
        if self.activation_checkpointing is Recompute.selective and not has_kernel(a, device, dtype):
            # Documents go by length, between graphs, and those write into what is kept (torch 2.13 raises at the backward).
            yield (
                "model.compile=true works with model.activation_checkpointing=selective only where a GPU has a kernel for "
                "packed documents (precision bf16 or fp16, Ampere or later, heads up to 256 in steps of 8, no "
                "bound of the scores and no sinks); use full or none"
            )

    def decided(self, chosen: Model) -> Iterator[str]:
        """A line for every setting that is null here and was ``chosen`` for the device."""
        if self.activation_checkpointing is None and chosen.activation_checkpointing is not None:
            yield f"model.activation_checkpointing={chosen.activation_checkpointing.value}: the least for the device's memory"
        if self.compile is None:
            yield f"model.compile={str(bool(chosen.compile)).lower()}: chosen for the device"
        if self.path is not None and self.rope_scaling is not None:
            a = self._of_folder(Path(self.path))
            kind, reach = self.rope_scaling.get("rope_type", "default"), f"{a.max_position_embeddings} positions"
            yield f"model.rope_scaling: {kind} in the place of the folder's own, up to {reach}; the export has it"

    @classmethod
    def override_problems(cls, typed: Sequence[str]) -> Iterator[str]:
        """What a command line says that ``model.path`` makes meaningless; ``typed``: its overrides (``key=value``)."""
        keys = [override.lstrip("+").partition("=")[0] for override in typed]
        shape = {"vocab_size", *(f.name for f in dataclasses.fields(Shape))} - {"rope_scaling"}
        given = [override for override in typed if override.lstrip("+").startswith("model.path=")]
        if given and not given[-1].endswith(("=null", "=")):
            for key in keys:
                if key == "model" or (key.startswith("model.") and key.removeprefix("model.") in shape):
                    yield f"{key} has no effect beside {given[-1]}: a folder has a shape of its own; leave one of them out"

    def architecture(self, vocab_size: int, *, grow: bool = False) -> Architecture:
        """The shape, for a tokenizer of ``vocab_size`` tokens; ``grow``: a folder's vocabulary may be too small for it.

        Raises:
            ConfigError: if the model's vocabulary is smaller than the tokenizer's.
        """
        shape = self._of_folder(Path(self.path)) if self.path else architecture_of(self, self.vocab_size or vocab_size)
        if shape.vocab_size < vocab_size and grow and self.path:
            return dataclasses.replace(shape, vocab_size=vocab_size)
        if shape.vocab_size < vocab_size:
            where = self.path or f"model.vocab_size={shape.vocab_size}"
            raise ConfigError(
                [f"{where} has {shape.vocab_size} tokens, fewer than the tokenizer's {vocab_size}; use its own"]
            )
        return shape

    def _of_folder(self, folder: Path) -> Architecture:
        """The folder's shape, its rotation scaled as set here."""
        a = read_shape(folder)
        return a if self.rope_scaling is None else stretched(a, self.rope_scaling)


@dataclass
class ModelLoader:
    """Builds models under a strategy: initialised sharded where it shards, the same numbers on any number of ranks.

    ``new_tokens``: the last ones of the vocabulary, which the folder was not trained on; where it has no rows for them, its
    tables grow. ``precision``: what they compute in. ``scores``: with a head that scores, a
    new one where the folder has none. ``longest``: tokens of the longest document, by which longrope chooses; None = the
    longest possible. ``kind``: the class to build. ``fake_quantizer``: rounds the weights of its blocks in every forward.
    """

    config: Model
    strategy: Strategy
    seed: int
    vocab_size: int
    adapter: Adapter = field(default_factory=Full)
    new_tokens: int = 0
    precision: Precision = field(default_factory=Precision)
    scores: bool = False
    longest: int | None = None
    kind: type[Transformer] = Transformer
    fake_quantizer: FakeQuantizer | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """The shape of the model."""
        return dataclasses.replace(
            self.config.architecture(self.vocab_size, grow=self.new_tokens > 0),
            scores=self.scores,
            longest=self.longest,
        )

    def fitted(self, recompute: Recompute) -> ModelLoader:
        """With the settings decided that are null: those of this device, and ``recompute``."""
        compiled = self.config.compile
        config = dataclasses.replace(self.config, activation_checkpointing=recompute)
        decided = dataclasses.replace(self, config=config)
        if compiled is None:
            compiled = torch.cuda.is_available() and not list(decided.obstacles())
        return dataclasses.replace(self, config=dataclasses.replace(config, compile=compiled))

    def validated(self) -> ModelLoader:
        """This loader, if the models that it builds can be trained.

        Raises:
            ConfigError: if blocks that shall be compiled cannot be, or the strategy needs another device.
        """
        problems = list(self.strategy.validate_device(cuda=torch.cuda.is_available()))
        if problems := [*problems, *(self.obstacles() if self.config.compile else ())]:
            raise ConfigError(problems)
        return self

    def rounded(self, qat: QAT) -> ModelLoader:
        """This loader, its models rounded as ``qat`` says."""
        return dataclasses.replace(self, fake_quantizer=qat.fake_quantizer(self.architecture))

    def obstacles(self) -> Iterator[str]:
        """What speaks against compiled blocks on this device, a sentence each."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield from self.strategy.validate_compiled()
        yield from self.adapter.validate_compiled()
        if any(layer.delta for layer in self.architecture.layers):
            # Torch 2.13 lays the solutions of triangular systems out otherwise than it traces them.
            yield "model.compile=true does not work with a gated delta rule; use model.compile=false"
        yield from self.config.validate_compiled(device, self.precision.dtype, self.architecture)

    def remarks(self) -> Iterator[str]:
        """A sentence for what of the folder is not read, or not as it is stored, and how ranks and adapter hold the rest."""
        yield from mesh_remarks(self.strategy.mesh, self.architecture)
        yield from self.adapter.remarks(self.architecture)
        if self.files is not None:
            sentences = remarks(self.files.files, packs=bool(self.packed))
            yield from (f"model.path={self.config.path}: {sentence}" for sentence in sentences)

    @cached_property
    def files(self) -> StoredWeights | None:
        """The tensors that the model starts from, if it starts from a folder."""
        return None if self.config.path is None else StoredWeights(Path(self.config.path), self.architecture)

    def load(self) -> Transformer:
        """The configured model, what is trained of it in float32."""
        grown = self.files is not None and self.new_tokens > 0
        with long_lived_allocations(), self.strategy.construction():
            with self.adapter.construction():
                model = self.kind(self.architecture, self.config.activation_checkpointing or Recompute.none)
            self.adapter.install(model, grown=grown)
        if self.fake_quantizer is not None:
            install(model, self.fake_quantizer)
        if self.precision.dtype is not torch.float32:
            for parameter in self.adapter.frozen_matrices(model):
                self.strategy.cast_frozen(parameter, self.precision.dtype)
        wanted = self._shapes_of(model)
        keep_stage(model, self.strategy.stages)
        with long_lived_allocations():
            self.strategy.place(model, model.model.layers, self.precision)
        if self.files is not None:
            self._validate_weights(self.files, wanted)
            for name, buffer in saved_buffers(model):
                buffer.copy_(self.start(name))
        filled = fill_packed(model, self.bytes_of, self.strategy.fill)
        for name, parameter in model.named_parameters():
            if name in filled:
                continue
            added = self.adapter.initial(name, self.strategy.shape_of(parameter), self.seed)
            self.strategy.fill(parameter, self.start(name) if added is None else added)
        if self.config.compile:
            model.compile_blocks()
        return model

    def frozen(self) -> nn.Module:
        """The configured model before any training, the adapter that it starts from included, for forwards alone."""
        start = dataclasses.replace(self, adapter=self.adapter.at_start, kind=Transformer)
        return self.strategy.freeze(start.load(), self.precision)

    def computing(self) -> AbstractContextManager[object]:
        """The context in which what it builds computes."""
        return self.strategy.computing(self.precision)

    def fingerprint(self) -> str:
        """Of what the model starts from."""
        base = f"{self.seed}:{self.architecture}" if self.files is None else self.files.fingerprint()
        if self.files is not None and any(rope.scaling for rope in self.architecture.ropes):
            # Set here, or chosen by the longest document.
            base = f"{base}:{self.architecture.ropes}:{self.longest}"
        if self.fake_quantizer is not None and self.fake_quantizer.active:
            base = f"{base}:{self.fake_quantizer.bits}:{self.fake_quantizer.group}"
        if self.packed:
            base = f"{base}:nf4:{hashlib.sha256(','.join(sorted(self.packed)).encode()).hexdigest()[:8]}"
        adapter = getattr(self.adapter, "path", None)
        return base if adapter is None else f"{base}:{AdapterFolder(Path(adapter)).fingerprint()}"

    def start(self, name: str) -> Tensor:
        """A parameter of the model before any training: out of the folder, or from the seed."""
        a = self.architecture
        if self.files is None or (name == HEAD and name not in self.files):
            return initial(name, self.shapes[name], self.seed, a.initializer_range, a.num_hidden_layers, a.norm_offset)
        values = self.files.tensor(name)
        if name.endswith(TABLES) and self.new_tokens > 0:
            # New tokens begin as the mean of all: then they neither attract nor repel (Hewitt 2021). A vocabulary that is
            # padded to a multiple has rows for them already, in which nothing was ever learnt.
            known = self.vocab_size - self.new_tokens
            mean = values[:known].double().mean(0, keepdim=True).to(values.dtype)
            new = mean.expand(self.new_tokens, -1)
            values = torch.cat([values[:known], new, values[self.vocab_size :]])
        return values

    def dequantised(self, name: str) -> Tensor:
        """A parameter as training computes with it at first: `start`, of a packed weight what its bytes stand for."""
        if name not in self.packed:
            return self.start(name)
        return unpack(self.bytes_of(name), self.packed[name], self.precision.dtype)

    def bytes_of(self, name: str) -> Packed:
        """A weight in NF4: as its folder stores it, where it does, else packed on this rank's device."""
        stored = None if self.files is None else self.files.packed(name)
        return pack(self.start(name).to(distributed.world().device)) if stored is None else Packed(*stored)

    @cached_property
    def packed(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that are held in NF4, by name."""
        return self.adapter.packed(self.architecture)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's own tensors, tied ones once, in their order."""
        with torch.device("meta"):
            model = Transformer(self.architecture)
        return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *saved_buffers(model)]}

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Those of them that no gradient changes: the choice biases of routers."""
        with torch.device("meta"):
            return frozenset(name for name, _ in saved_buffers(Transformer(self.architecture)))

    @cached_property
    def _rows_added(self) -> int:
        assert self.config.path is not None
        return self.architecture.vocab_size - read_architecture(Path(self.config.path)).vocab_size

    def _shapes_of(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of the tensors that a model takes from its folder."""
        packed = packed_weights(model)
        parameters = {n: self.strategy.shape_of(p) for n, p in model.named_parameters() if not is_adapter(n)}
        wide = {n: shape for n, shape in parameters.items() if n.rpartition(".")[0] not in packed}
        buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(model)}
        return {**wide, **{name: weight.shape for name, weight in packed.items()}, **buffers}

    def _validate_weights(self, files: StoredWeights, wanted: dict[str, tuple[int, ...]]) -> None:
        tied = {"lm_head.weight"} if self.architecture.tie_word_embeddings or self.scores else set[str]()
        files.validate(wanted, {HEAD, *tied}, TABLES, self._rows_added)
