"""ZeRO-1, 2 and 3 through DeepSpeed (Rajbhandari et al. 2020, arXiv:1910.02054), behind the contract of every engine.

DeepSpeed partitions and exchanges. The loss scale, clipping, and the decision to skip a step stay ours: its optimizer hands
the global norm to `ZeroEngine`, which sets what PyTorch's fused AdamW divides by. So a step means the same as under DDP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import schema, setting
from trainer.optim import Muon, Optimizer
from trainer.optim.state import settle
from trainer.parallel import distributed, zero_state, zero_waits
from trainer.parallel.distributed import World
from trainer.parallel.engine import Decision, Engine, Fragment, Outcome, digest_of
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Offload, Strategy

OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "scheduler", "fp16", "bf16", "torch_autocast", "zero_allow_untested_optimizer", "zero_optimization.stage",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "zero_optimization.round_robin_gradients",
    "data_types",
)  # fmt: skip
"""DeepSpeed settings that our own settings, or the checkpoints, decide."""


BUCKET = 50_000_000
"""Elements that DeepSpeed exchanges together."""


def live_parameters(cuda: bool) -> int:
    """Elements that ZeRO-3 keeps gathered. On CUDA room to gather the next ones beside a large vocabulary's table."""
    return 10 * BUCKET if cuda else 2 * BUCKET


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

    def validate_optimizer(self, optimizer: Optimizer) -> Iterator[str]:
        if isinstance(optimizer, Muon):
            yield f"optimizer=muon needs whole matrices, and strategy={self.name} flattens them; use strategy=ddp or adamw"
        if self.offload is not Offload.none and getattr(optimizer, "state", "") == "paged8bit":
            where = f"strategy.offload={self.offload} keeps optimizer state in CPU memory already"
            yield f"optimizer.state=paged8bit has nothing to page: {where}; use optimizer.state=8bit"

    def validate_compiled(self) -> Iterator[str]:
        if self.stage == 3:
            yield (
                "model.compile=true compiles next to nothing under strategy=zero3, which gathers the weights of every layer "
                "between graphs; use strategy=fsdp, or model.compile=false"
            )

    def construction(self) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        ds = _deepspeed()
        return ds.zero.Init(config_dict_or_path=self._settings(Precision()), remote_device=self._remote())  # type: ignore[no-any-return]

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, values: Tensor) -> None:
        if self.stage < 3:
            super().fill(parameter, values)
            return
        start, size = zero_state.share(parameter)
        if size > 0:
            parameter.ds_tensor[:size].copy_(values.reshape(-1)[start : start + size])  # type: ignore[attr-defined]

    def cast_frozen(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        # DeepSpeed gathers parameters of one format only.
        if self.stage < 3:
            super().cast_frozen(parameter, dtype)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        self._cast_shards(module, precision)
        return ZeroEngine(module, optimizer, precision, self)

    def freeze(self, module: nn.Module, precision: Precision) -> nn.Module:
        if self.stage < 3:
            return super().freeze(module, precision)
        module.requires_grad_(False).eval()
        self._cast_shards(module, precision)
        _enter_in_forward(module, partial(self.computing, precision))
        engine, *_ = _deepspeed().initialize(model=module, config=self._settings(precision))
        return engine  # type: ignore[no-any-return]

    def _cast_shards(self, module: nn.Module, precision: Precision) -> None:
        """Hold sharded parameters in bfloat16 where the working copy is: DeepSpeed converts only those that are whole.

        Bytes stay bytes. Not by building them so: it would narrow every buffer, too.
        """
        if self.stage == 3 and self.low_precision_weights(precision, cuda=distributed.world().device.type == "cuda"):
            for parameter in filter(torch.is_floating_point, module.parameters()):
                shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                narrow = shard.data.to(precision.dtype)
                shard.data = narrow.pin_memory() if shard.is_pinned() else narrow
                parameter.data = parameter.data.to(precision.dtype)

    def low_precision_weights(self, precision: Precision, *, cuda: bool) -> bool:
        """Whether the working copy of the weights is bfloat16."""
        autocast = not cuda if self.autocast is None else self.autocast
        return precision.compute is Compute.bf16 and not autocast

    def _remote(self) -> str | None:
        return "cpu" if self.offload is Offload.parameters else None

    def _settings(self, precision: Precision) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        cuda = distributed.world().device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            # On a stream of its own, beside the backward.
            "overlap_comm": cuda,
            # DeepSpeed's own defaults set 2 GB aside for gradients and keep a billion gathered parameters.
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **(
                {
                    "stage3_max_live_parameters": live_parameters(cuda),
                    "stage3_max_reuse_distance": live_parameters(cuda),
                }
                if self.stage == 3
                else {}
            ),
        }
        if self.offload is not Offload.none:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        if self.offload is Offload.parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
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
        if self.low_precision_weights(precision, cuda=cuda):
            # Without looking for overflows: `_on_norm` decides, and DeepSpeed would wait for the device twice.
            config["bf16"] = {"enabled": True, "check_grad_overflow": False}
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
        super().__init__(module, optimizer, precision)
        self.stage = strategy.stage
        self.low_precision_weights = strategy.low_precision_weights(precision, cuda=self.device.type == "cuda")
        self.optimizers = optimizer.build(module, strategy.shape_of)
        [inner] = self.optimizers
        self.inner: Any = inner
        _enter_in_forward(module, self.autocast)
        engine, *_ = _deepspeed().initialize(model=module, optimizer=inner, config=strategy._settings(precision))
        self.model = engine
        self._engine: Any = engine
        self.zero = engine.optimizer
        zero_waits.leave_norm_on_device(self.zero, self.stage)
        self.zero.unscale_and_clip_grads = self._on_norm
        self._limit: Tensor | None = None
        self._decision: Decision | None = None
        self.state_of = zero_state.reader(module, inner, self.zero, self.stage)
        # What lives in CPU memory is stepped by the host, which has to wait for its gradients.
        waits = self.device.type != "cuda" or strategy.offload is not Offload.none
        self._awaited = nullcontext if waits else partial(zero_waits.exchange_awaited_on_device, self.zero)

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with self._awaited():
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, limit: Tensor | None = None) -> Outcome:
        self._limit = limit
        self._engine.step()
        assert self._decision is not None
        (norm, applied, _), self._decision = self._decision, None
        self.scale.update(~torch.isfinite(norm))
        return Outcome(norm, applied)

    def _on_norm(self, _: Any, total_norm: Any) -> None:
        """Stands where DeepSpeed would unscale and clip, for every partition that it is about to update.

        Takes its global norm, infinite after an overflow, and tells the fused AdamW what to do with the gradient.
        """
        if self._decision is None:
            norm = torch.as_tensor(total_norm, dtype=torch.float32, device=self.device)
            self._decision = self.decide(norm, self._limit)
            partitions = self.state_of.device
            self.inner.grad_scale = self._decision.divisor.to(partitions)
            self.inner.found_inf = (~self._decision.applied).float().to(partitions)

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

    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> float:
        self.state_of.create_moments()
        self.state_of.set_optimizer_steps(steps)
        self.state_of.refresh()
        self.scale.load(state.get("loss_scale", {}))
        return settle(self.optimizers)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.low_precision_weights else self.precision.autocast(self.device)


def _enter_in_forward(module: nn.Module, compute: Callable[[], AbstractContextManager[object]]) -> None:
    """Let a module's own forward enter the format that it computes in.

    DeepSpeed's forward switches off an autocast for CUDA that was entered around it, and without a word computes in float32.
    """
    forward = module.forward

    @wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with compute():
            return forward(*args, **kwargs)

    module.forward = inside


def deepspeed_variables(world: World) -> dict[str, str]:
    """What tells DeepSpeed its device: not always the local rank, where a task sees only its own GPU (--gpus-per-task=1)."""
    index = world.local_rank if world.device.index is None else world.device.index
    return {"DS_ACCELERATOR": world.device.type, "LOCAL_RANK": str(index)}


def _deepspeed() -> Any:
    """DeepSpeed, quiet, on the session's process group, and without compiling anything."""
    os.environ.update(deepspeed_variables(distributed.world()))
    distributed.ensure_group()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.runtime.engine.is_zero_supported_optimizer = lambda _: True  # else it warns of any but its own
    # What DeepSpeed may compile. Finding out runs a compiler; building the shared-memory exchange takes a minute, and a build
    # that was killed leaves a lock that later runs wait for.
    deepspeed.ops.__compatible_ops__ = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(distributed.backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _lookup(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for key, value in theirs.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _merged(both[key], value) if nested else value
    return both
