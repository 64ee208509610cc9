"""ZeRO-1, 2 and 3 through DeepSpeed (Rajbhandari et al. 2020, arXiv:1910.02054), behind the contract of every engine.

DeepSpeed partitions and exchanges. The loss scale, clipping, and the decision to skip a step stay ours: its optimizer hands
the global norm to `_Applied`, which sets what PyTorch's fused AdamW divides by. So a step means the same as under DDP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.optim import Muon, Optimizer
from trainer.parallel import distributed, zero_state
from trainer.parallel.engine import Engine, Fragment, LossOf, Outcome, Report, digest_of
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Strategy

OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "scheduler", "fp16", "bf16", "torch_autocast", "zero_allow_untested_optimizer", "zero_optimization.stage",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "zero_optimization.round_robin_gradients",
    "data_types",
)  # fmt: skip
"""DeepSpeed settings that our own settings, or the checkpoints, decide."""


BUCKET = 50_000_000
"""Elements that DeepSpeed exchanges together."""


class Offload(StrEnum):
    """What lives in CPU memory."""

    none = auto()
    optimizer = auto()
    parameters = auto()


@dataclass
class Zero(Strategy):
    """What the three stages share."""

    offload: Offload = setting(Offload.none, "what lives in CPU memory: nothing, optimizer, or parameters too (zero3)")
    autocast: bool | None = setting(
        None, "bf16 by autocast over float32 weights instead of bf16 weights; null = on CPU only"
    )
    deepspeed: dict[str, Any] = setting(dict, "further DeepSpeed settings, as its JSON file has them")

    @property
    def stage(self) -> int:
        """1: optimizer state is sharded; 2: gradients too; 3: parameters too."""
        raise NotImplementedError(f"{type(self).__name__} names no stage")

    def problems(self) -> Iterator[str]:
        if self.offload is Offload.parameters and self.stage != 3:
            yield f"strategy.offload=parameters needs strategy=zero3; {self.name} can offload the optimizer"
        for key in OURS:
            if _lookup(self.deepspeed, key) is not None:
                yield f"strategy.deepspeed.{key} contradicts Onecurve's own settings; leave it out"

    def refusals(self, optimizer: Optimizer) -> Iterator[str]:
        if isinstance(optimizer, Muon):
            yield f"optimizer=muon needs whole matrices, and strategy={self.name} flattens them; use strategy=ddp or adamw"

    def construction(self) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        ds = _deepspeed()
        return ds.zero.Init(config_dict_or_path=self._settings(Precision()), remote_device=self._remote())  # type: ignore[no-any-return]

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, values: Tensor) -> None:
        if self.stage < 3:
            super().fill(parameter, values)
            return
        start, size = zero_state.share(parameter)
        if size > 0:
            parameter.ds_tensor[:size].copy_(values.reshape(-1)[start : start + size])  # type: ignore[attr-defined]

    def narrow(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        # DeepSpeed gathers parameters of one format only.
        if self.stage < 3:
            super().narrow(parameter, dtype)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        self._narrow_shards(module, precision)
        return ZeroEngine(module, optimizer, precision, self)

    def freeze(self, module: nn.Module, precision: Precision) -> nn.Module:
        if self.stage < 3:
            return super().freeze(module, precision)
        module.requires_grad_(False).eval()
        self._narrow_shards(module, precision)
        engine, *_ = _deepspeed().initialize(model=module, config=self._settings(precision))
        return engine  # type: ignore[no-any-return]

    def _narrow_shards(self, module: nn.Module, precision: Precision) -> None:
        """Hold sharded parameters in bfloat16 where the working copy is: DeepSpeed converts only those that are whole.

        Not by building them so: it would narrow every buffer, too.
        """
        if self.stage == 3 and self.low(precision, cuda=distributed.world().device.type == "cuda"):
            for parameter in module.parameters():
                shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                narrow = shard.data.to(precision.dtype)
                shard.data = narrow.pin_memory() if shard.is_pinned() else narrow
                parameter.data = parameter.data.to(precision.dtype)

    def low(self, precision: Precision, *, cuda: bool) -> bool:
        """Whether the working copy of the weights is bfloat16."""
        autocast = not cuda if self.autocast is None else self.autocast
        return precision.compute is Compute.bf16 and not autocast

    def _remote(self) -> str | None:
        return "cpu" if self.offload is Offload.parameters else None

    def _settings(self, precision: Precision) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            # DeepSpeed's own defaults set 2 GB aside for gradients and keep a billion gathered parameters.
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **(
                {"stage3_max_live_parameters": 2 * BUCKET, "stage3_max_reuse_distance": 2 * BUCKET}
                if self.stage == 3
                else {}
            ),
        }
        if self.offload is not Offload.none:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": distributed.world().device.type == "cuda"}
        if self.offload is Offload.parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": distributed.world().device.type == "cuda"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Absent, it would be 1.0.
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": zero,
        }
        if self.low(precision, cuda=distributed.world().device.type == "cuda"):
            config["bf16"] = {"enabled": True}
            if self.stage > 1:
                # At stage 1 this would select another optimizer of DeepSpeed's, without partitions that can be read: there
                # micro-batches are added up in bfloat16.
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        return _merged(config, self.deepspeed)


@schema("strategy/zero1")
@dataclass
class Zero1(Zero):
    """Optimizer state is sharded over the ranks."""

    @property
    def stage(self) -> int:
        return 1


@schema("strategy/zero2")
@dataclass
class Zero2(Zero):
    """Optimizer state and gradients are sharded over the ranks."""

    @property
    def stage(self) -> int:
        return 2


@schema("strategy/zero3")
@dataclass
class Zero3(Zero):
    """Optimizer state, gradients and parameters are sharded over the ranks."""

    @property
    def stage(self) -> int:
        return 3


class ZeroEngine(Engine):
    """A DeepSpeed engine whose optimizer step is decided by us."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: Precision, strategy: Zero) -> None:
        world = distributed.world()
        self.device, self.ranks, self.stage = world.device, world.size, strategy.stage
        self.precision, self.clip = precision, optimizer.clip
        self.low = strategy.low(precision, cuda=world.device.type == "cuda")
        self.module = module
        [inner] = optimizer.build(module)
        ds = _deepspeed()
        engine, *_ = ds.initialize(model=module, optimizer=inner, config=strategy._settings(precision))
        self.model = engine
        self._engine: Any = engine
        self.zero = engine.optimizer
        self.inner: Any = inner
        self.scale = precision.loss_scale(self.device)
        self._weighed = torch.ones((), dtype=torch.bool, device=self.device)
        self._decision = _Applied(self)
        self.zero.unscale_and_clip_grads = self._decision
        self.state_of = zero_state.reader(module, inner, self.zero, self.stage)

    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        reports = []
        self.model.train()
        self._weighed = weight > 0
        # DeepSpeed averages over ranks; the objective is a sum over them.
        factor = self.scale.scale * self.ranks / weight.clamp(min=1e-30).float()
        with self.autocast():
            for number, batch in enumerate(micro_batches, start=1):
                self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
                loss, report = loss_of(batch.to(self.device))
                with torch.autocast(self.device.type, enabled=False):
                    self._engine.backward(loss * factor, scale_wrt_gas=False)
                reports.append(report)
        return reports

    def step(self, limit: Tensor | None = None) -> Outcome:
        self._decision.begin(limit)
        self._engine.step()
        norm, applied = self._decision.outcome(bool(getattr(self.zero, "overflow", False)))
        self.scale.update(~torch.isfinite(norm))
        return Outcome(norm, applied)

    def set_lr(self, factor: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = group["base_lr"] * factor

    def gathered(self, *, only: Callable[[str], bool] = bool) -> AbstractContextManager[nn.Module]:
        return zero_state.gathered(self.module, self.zero, only) if self.stage == 3 else nullcontext(self.module)

    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        yield from self.state_of.full_weights(frozen)

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        self.state_of.create_moments()
        yield from self.state_of.fragments(owned)

    def digest(self) -> list[int]:
        return [] if self.stage == 3 else digest_of(self.module.parameters())

    def optimizer_steps(self) -> dict[str, float]:
        return self.state_of.optimizer_steps()

    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> None:
        self.state_of.create_moments()
        self.state_of.set_optimizer_steps(steps)
        self.state_of.refresh()
        self.scale.load(state.get("loss_scale", {}))

    def state(self) -> dict[str, Any]:
        return {"loss_scale": self.scale.state()}

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.low else self.precision.autocast(self.device)


class _Applied:
    """Stands where DeepSpeed would unscale and clip: takes its global norm and tells the fused AdamW what to do with it."""

    def __init__(self, engine: ZeroEngine) -> None:
        self.engine = engine
        self.begin(None)

    def begin(self, limit: Tensor | None) -> None:
        """A step begins, of which nothing is known yet."""
        self.limit = limit
        self.norm: Tensor | None = None
        self.applied: Tensor | None = None

    def __call__(self, _: Any, total_norm: Any) -> None:
        """Called by DeepSpeed for every partition that it is about to update."""
        if self.norm is not None:
            return
        engine = self.engine
        scale = engine.scale.scale
        norm = torch.as_tensor(total_norm, dtype=torch.float32, device=engine.device) / scale
        finite = torch.isfinite(norm) & (norm >= 0)
        applied = finite & engine._weighed
        if self.limit is not None:
            applied = applied & (norm <= self.limit)
        shrink = (engine.clip / (norm + 1e-6)).clamp(max=1.0) if engine.clip else torch.ones_like(norm)
        self.norm, self.applied = torch.where(finite, norm, torch.inf), applied
        place = engine.state_of.device
        engine.inner.grad_scale = (scale / torch.where(finite, shrink, 1.0)).to(place)
        engine.inner.found_inf = (~applied).float().to(place)

    def outcome(self, overflow: bool) -> tuple[Tensor, Tensor]:
        """(norm, applied) of the step; where DeepSpeed found an overflow it asked for nothing."""
        if overflow or self.norm is None or self.applied is None:
            infinite = torch.full((), torch.inf, device=self.engine.device)
            return infinite, torch.zeros((), dtype=torch.bool, device=self.engine.device)
        return self.norm, self.applied


def _deepspeed() -> Any:
    """DeepSpeed, quiet, on the session's process group, and without compiling anything."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    distributed.ensure_group()
    # DeepSpeed looks for it even where no launcher set it.
    os.environ.setdefault("LOCAL_RANK", str(distributed.world().local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # What DeepSpeed may compile. Finding out runs a compiler; building the shared-memory exchange takes a minute, and a build
    # that was killed leaves a lock that later runs wait for.
    deepspeed.ops.__compatible_ops__ = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(distributed.backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _lookup(settings: Mapping[str, Any], path: str) -> Any:
    found: Any = settings
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for key, value in theirs.items():
        both[key] = (
            _merged(both[key], value) if isinstance(value, Mapping) and isinstance(both.get(key), Mapping) else value
        )
    return both
