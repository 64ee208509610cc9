"""Optimizers, their parameter groups, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ConfigError, Node, schema, setting
from trainer.functional.bitsandbytes import absent_library
from trainer.optim.eight_bit import BLOCK, SMALLEST, EightBitAdamW
from trainer.optim.muon import BatchedMuon, Replicas

Groups = list[dict[str, Any]]
ShapeOf = Callable[[nn.Parameter], Sequence[int]]


def shape(parameter: nn.Parameter) -> Sequence[int]:
    """The shape of a parameter that this rank holds as it is."""
    return parameter.shape


@dataclass
class Optimizer(Node):
    """What every optimizer needs to know."""

    lr: float | None = setting(None, "base learning rate; null = the pipeline's default", least=0)
    weight_decay: float = setting(0.1, "decoupled decay of matrices; never of norms and biases", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0 = off", least=0)

    def build(self, module: nn.Module, shape_of: ShapeOf = shape) -> list[torch.optim.Optimizer]:
        """Optimizers over the trained parameters of ``module``; `lr` must be known by now.

        Args:
            module: What is trained.
            shape_of: Gives a parameter's logical shape, where a strategy shards the parameter itself away.
        """
        raise NotImplementedError(f"{type(self).__name__} builds no optimizer")

    @property
    def moment(self) -> float:
        """Bytes of a moment of an element of hidden matrices."""
        return 4.0

    def check_machine(self) -> None:
        """Check that this machine has what it needs; called where a run starts on it.

        Raises:
            ConfigError: if something is missing.
        """

    def remarks(self, module: nn.Module, shape_of: ShapeOf = shape) -> Iterator[str]:
        """What is to be said of training ``module``; ``shape_of``: as for `build`."""
        yield from ()

    def share_work(self, optimizers: Sequence[torch.optim.Optimizer], replicas: Replicas) -> None:
        """Tell what `build` made that ``replicas`` hold the same parameters; some divide a step's work among them."""

    def groups(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rates: Mapping[str, float] = {},
        shape_of: ShapeOf = shape,
    ) -> Groups:
        """Split into decayed matrices and undecayed vectors, each group with its own ``base_lr``.

        Args:
            parameters: By name.
            rates: Base learning rates of parameters whose names begin so; of the others it is ``lr``.
            shape_of: Gives a parameter's logical shape.
        """
        assert self.lr is not None
        kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            vector = is_vector(name, shape_of(parameter))
            kinds.setdefault((rate_of(name, rates, self.lr), vector), []).append(parameter)
        return [
            {"params": p, "lr": lr, "base_lr": lr, "weight_decay": 0.0 if vector else self.weight_decay}
            for (lr, vector), p in sorted(kinds.items(), key=lambda kind: (kind[0][0] != self.lr, kind[0][1]))
        ]


STATES = {"fp32": 4.0, "8bit": 1 + 4 / BLOCK, "paged8bit": 1 + 4 / BLOCK}
"""Formats of moments, and the bytes of an element that is in that format."""


@schema("optimizer/adamw")
@dataclass
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), PyTorch's fused kernel; in 8 bits bitsandbytes'."""

    beta1: float = setting(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    state: str = setting(
        "fp32",
        "format of the moments of hidden matrices; paged8bit: 8 bits, moved to CPU memory where the GPU's is full",
        choices=STATES,
    )

    @property
    def moment(self) -> float:
        return STATES[self.state]

    def check_machine(self) -> None:
        problems = []
        if self.state != "fp32" and (absent := absent_library(f"optimizer.state={self.state}")):
            problems.append(absent)
        if self.state == "paged8bit" and not torch.cuda.is_available():
            problems.append(
                "optimizer.state=paged8bit pages the memory of a GPU, and this machine has none; use optimizer.state=8bit"
            )
        if problems:
            raise ConfigError(problems)

    def build(self, module: nn.Module, shape_of: ShapeOf = shape) -> list[torch.optim.Optimizer]:
        rates, lr, betas = rates_of(module), self.lr or 0.0, (self.beta1, self.beta2)
        if self.state == "fp32":
            groups = self.groups(trained(module), rates, shape_of)
            return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=self.eps, fused=True)]
        narrow = narrow_matrices(module, shape_of)
        groups = [
            {**group, "eight_bit": eight_bit}
            for eight_bit in (True, False)
            for group in self.groups(
                ((n, p) for n, p in trained(module) if (id(p) in narrow) == eight_bit), rates, shape_of
            )
        ]
        return [EightBitAdamW(groups, lr=lr, betas=betas, eps=self.eps, paged=self.state == "paged8bit")]

    def remarks(self, module: nn.Module, shape_of: ShapeOf = shape) -> Iterator[str]:
        if self.state != "fp32":
            sizes = {id(p): math.prod(shape_of(p)) for _, p in trained(module)}
            narrow, every = sum(sizes[one] for one in narrow_matrices(module, shape_of)), sum(sizes.values())
            wide = f"embeddings, heads, norms, biases and matrices of fewer than {SMALLEST} elements keep float32"
            yield f"8-bit states: {narrow / every:.0%} of {every:,} trained elements; {wide}"


@schema("optimizer/muon")
@dataclass
class Muon(AdamW):
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases and heads.

    (Jordan et al. 2024; scaled to AdamW's update size as in Liu et al. 2025, arXiv:2502.16982, so that one ``lr`` serves
    both.)
    """

    momentum: float = setting(0.95, "Nesterov momentum of the matrices", least=0, below=1)
    adamw_lr: float | None = setting(
        None, "base learning rate of everything but the hidden matrices; null = lr", least=0
    )

    def problems(self) -> Iterator[str]:
        if self.state != "fp32":
            yield (
                f"optimizer.state={self.state} is for the moments of hidden matrices, of which optimizer=muon keeps none; "
                "use optimizer=adamw or optimizer.state=fp32"
            )

    def build(self, module: nn.Module, shape_of: ShapeOf = shape) -> list[torch.optim.Optimizer]:
        hidden = {id(p) for p in hidden_matrices(module)}
        assert self.lr is not None
        rates, matrices = rates_of(module), dict[float, list[nn.Parameter]]()
        for name, p in trained(module):
            if id(p) in hidden:
                matrices.setdefault(rate_of(name, rates, self.lr), []).append(p)
        others = self.groups(((n, p) for n, p in trained(module) if id(p) not in hidden), rates, shape_of)
        for group in others if self.adamw_lr is not None else ():
            if group["base_lr"] == self.lr:
                group["lr"] = group["base_lr"] = self.adamw_lr
        hidden_groups = [{"params": p, "lr": lr, "base_lr": lr} for lr, p in matrices.items()]
        built: list[torch.optim.Optimizer] = []
        if hidden_groups:
            built.append(BatchedMuon(hidden_groups, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum))
        if others:  # none of adapters alone
            betas = (self.beta1, self.beta2)
            built.append(torch.optim.AdamW(others, lr=self.lr, betas=betas, eps=self.eps, fused=True))
        return built

    def share_work(self, optimizers: Sequence[torch.optim.Optimizer], replicas: Replicas) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, BatchedMuon):
                optimizer.replicas = replicas


def is_vector(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter only scales or shifts, and is not decayed: also norms with a row a head, biases one an expert."""
    return len(shape) < 2 or name.endswith("bias") or "norm" in name.rpartition(".")[0].rpartition(".")[2]


def applies_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its own step unscales and skips, by tensors: ``grad_scale``, ``found_inf``."""
    return isinstance(optimizer, torch.optim.AdamW | BatchedMuon)


def rate_of(name: str, rates: Mapping[str, float], usual: float) -> float:
    """The base learning rate of a parameter: that of the beginning of its name which ``rates`` knows, else the usual one."""
    return next((rate for start, rate in rates.items() if name.startswith(start)), usual)


def rates_of(module: nn.Module) -> Mapping[str, float]:
    """Base learning rates that a module wants for some of its parameters, by beginning of name."""
    return dict(getattr(module, "rates", {}))


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that receive gradients, tied ones once."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """Weights of linear layers, or of stacks of them, that are neither an embedding nor the vocabulary projection."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers = [(name, m.weight) for name, m in module.named_modules() if isinstance(m, nn.Linear) or _stacked(m)]
    linears = [(name, weight) for name, weight in layers if isinstance(weight, Tensor)]  # others are packed, and frozen
    heads = {id(w) for name, w in linears if name.rpartition(".")[2].endswith("head")}
    return [w for _, w in linears if w.requires_grad and id(w) not in embeddings | heads]


def narrow_matrices(module: nn.Module, shape_of: ShapeOf = shape) -> set[int]:
    """The ids of hidden matrices that are large enough for moments in 8 bits."""
    large = {id(p) for _, p in trained(module) if math.prod(shape_of(p)) >= SMALLEST}
    return large & {id(weight) for weight in hidden_matrices(module)}


def _stacked(module: nn.Module) -> bool:
    return bool(getattr(module, "casts_weights", False))


WARMUP = 0.03
"""The part of a run that warms up where the steps that are set do not fit into it."""


@dataclass
class Schedule(Node):
    """The learning rate over the steps, as a factor of each group's base rate. ``warmup`` steps rise linearly from 0."""

    warmup: float = setting(
        0, "steps of linear warm-up; below 1 the part of the run, which is 0.03 where the steps do not fit", least=0
    )

    def problems(self) -> Iterator[str]:
        if self.warmup > 1 and self.warmup != int(self.warmup):
            yield f"schedule.warmup={self.warmup} is neither a number of steps nor a part of the run (below 1); use one"

    def warmup_steps(self, steps: int) -> int:
        """The steps that warm up, of a run of ``steps``."""
        if self.warmup >= 1 and self.warmup <= steps:
            return int(self.warmup)
        return math.ceil(round((WARMUP if self.warmup > steps else self.warmup) * steps, 6))

    def remarks(self, steps: int) -> Iterator[str]:
        """What is to be said of a run of ``steps``."""
        if self.warmup > steps:
            taken = f"it is taken as {WARMUP:g} of the run, {self.warmup_steps(steps)}"
            yield f"schedule.warmup={self.warmup:g} steps do not fit into steps={steps}; {taken}"

    def __call__(self, step: int, steps: int) -> float:
        """The factor for ``step`` (1 .. ``steps``); a run of one step, which has no curve, takes it at the base rate."""
        return 1.0 if steps == 1 else self.factor(step, steps)

    def factor(self, step: int, steps: int) -> float:
        """As the call, of a run of at least two steps."""
        warmup = self.warmup_steps(steps)
        if step <= warmup:
            return step / warmup
        return self.after_warmup(step - warmup, max(1, steps - warmup))

    def after_warmup(self, step: int, steps: int) -> float:
        """The factor for the ``step``-th of the ``steps`` that follow the warm-up."""
        raise NotImplementedError(f"{type(self).__name__} has no curve")


@schema("schedule/constant")
@dataclass
class Constant(Schedule):
    """The base rate throughout."""

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


@schema("schedule/linear")
@dataclass
class Linear(Schedule):
    """A straight line down to ``floor``."""

    floor: float = setting(0.0, "the factor at the last step", least=0, most=1)

    def after_warmup(self, step: int, steps: int) -> float:
        return 1 - (1 - self.floor) * step / steps


@schema("schedule/cosine")
@dataclass
class Cosine(Schedule):
    """Half a cosine down to ``floor`` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    floor: float = setting(0.1, "the factor at the last step", least=0, most=1)

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


@schema("schedule/wsd")
@dataclass
class WarmupStableDecay(Schedule):
    """The base rate, and in the end ``1 - sqrt`` down to ``floor`` (Hägele et al. 2024, arXiv:2405.18392)."""

    decay: float = setting(0.2, "the part of all steps that decays", above=0, most=1)
    floor: float = setting(0.0, "the factor at the last step", least=0, most=1)

    def factor(self, step: int, steps: int) -> float:
        length = max(1, round(self.decay * steps))
        return super().factor(step, steps) * self._decayed(max(0, step - (steps - length)) / length)

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0

    def _decayed(self, part: float) -> float:
        return self.floor + (1 - self.floor) * (1 - math.sqrt(part))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all gradients, a float32 scalar on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
