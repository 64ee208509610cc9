"""Fake CUDA: real steps on tensors of device ``cuda`` that have no memory, and what they would ask of a device.

Imported in a process of its own (`steps.py`), whose torch believes that there is a GPU. Nothing is computed; what is
counted is exact: kernels launched, copies and questions that wait for the device, and operations that mix devices.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
SOURCES = str(Path(__file__).parents[2] / "trainer")
NO_KERNEL = {
    "_local_scalar_dense", "_unsafe_view", "_reshape_alias", "alias", "detach", "empty", "empty_like", "empty_strided",
    "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "record_stream", "resize_", "set_",
}  # fmt: skip
"""Operations that launch nothing, beside views."""
COUNTS_ELEMENTS = {"nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal", "bincount"}
"""Operations whose result's shape depends on values: they wait for the device."""


asking: list[Asked] = []
"""What counts now."""
answers: list[int] = [1]
"""The last one is what the device answers where the host asks for a number."""
pinned: dict[int, torch.Tensor] = {}
"""Host memory that copies need not wait for, by its storage; held, so that no other storage takes its place."""


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Say that a tensor of the host is in memory of that kind."""
    pinned[tensor.untyped_storage()._cdata] = tensor
    return tensor


def waited(what: str) -> None:
    """The host waits for the device."""
    if asking:
        asking[-1].stalls[f"{what} at {where()}"] += 1


def resize(storage: torch.UntypedStorage, size: int) -> None:
    """Give a storage another size, as FSDP does with what it gathers; no operation says so."""
    torch._C.StorageBase.resize_(storage, size)  # type: ignore[attr-defined]
    for asked in asking:
        asked.resized(storage, size)


class Event:
    """Stands in for `torch.cuda.Event`, and for streams."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waited("a stream or event")

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self) -> Event:
        return self

    def elapsed_time(self, _: Any) -> float:
        return 1.0


kernels = torch.library.Library("aten", "IMPL")


def _rms_norm(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(up: torch.Tensor, x: torch.Tensor, _: Any, __: Any, weight: torch.Tensor, *___: Any) -> Any:
    return torch.empty_like(x), torch.empty_like(weight)


def _silu_backward(up: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.empty_like(up)


MADE: dict[str, Any] = {
    "_fused_rms_norm": _rms_norm, "_fused_rms_norm_backward": _rms_norm_backward, "silu_backward": _silu_backward,
}  # fmt: skip
"""Kernels of CUDA that a CPU build lacks, so that it would compute them by several others."""


def pretend() -> None:
    """Make this process believe in a GPU."""
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.Event = cuda.Stream = Event
    cuda.current_stream = cuda.default_stream = Event
    cuda.stream, cuda.synchronize = nullcontext, lambda *_: waited("the device")
    torch.Tensor.record_stream = lambda self, _: None  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = lambda self, *_: pin(self)  # type: ignore[method-assign, assignment]
    cuda.current_device, cuda.set_device, cuda.empty_cache = (lambda: 0), (lambda *_: None), (lambda: None)
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.amp.common.amp_definitely_not_available = lambda: False
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)
    for name, made in MADE.items():
        kernels.impl(name, made, "CUDA")
    # A module is built where it belongs; moving parameters without memory is not possible.
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]


class Asked(TorchDispatchMode):
    """What was asked of the device while this was active; every count by the lines of ours that it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.stalls: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.unpinned: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self._bytes = self._most = self._before = 0
        self._alive: dict[int, int] = {}

    def __enter__(self) -> Asked:
        asking.append(self)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        asking.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._hold((args, kwargs), before=True)
        out = self._answer(func, args, kwargs)
        self._hold(out, before=False)
        return out

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        if kwargs.pop("pin_memory", None):
            with unset_fake_temporarily():
                return pin(func(*args, **kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu")).type
        on_host = not any(t.device.type == "cuda" for t in tensors)
        if on_host and not any(isinstance(t, FakeTensor) for t in tensors):
            return self._from_host(func, name, tensors, args, kwargs, to_cuda=device == "cuda")
        if on_host and device == "cpu":
            # What the host computes with tensors that have no memory there either.
            return 1.0 if name == "_local_scalar_dense" else func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self._stalls(".item()")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else answers[-1])
        counts = name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None
        if name in COUNTS_ELEMENTS or counts:
            self._stalls(name)
        if name == "nonzero":
            return args[0].new_empty((max(1, args[0].numel() // 2), args[0].dim()), dtype=torch.int64)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], [self._index(i) for i in args[1]], *args[2:])
        if name == "_to_copy" and tensors[0].device.type != device:
            self._copied(tensors[0], device, kwargs.get("non_blocking", False))
            if device == "cpu":
                with unset_fake_temporarily():
                    return torch.full(tensors[0].shape, answers[-1], dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "copy_" and tensors[0].device.type != tensors[1].device.type:
            quietly = bool(kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
            self._copied(tensors[1], tensors[0].device.type, quietly, into=tensors[0])
            if tensors[0].device.type == "cpu":
                return tensors[0]
        elif name != "_to_copy" and any(t.device.type == "cpu" and t.dim() > 0 for t in tensors):
            self.mixed[f"{name} at {where()}"] += 1
        self._launched(func, name)
        return MADE.get(name, func)(*args, **kwargs)

    def _from_host(
        self, func: Any, name: str, tensors: list[Any], args: Any, kwargs: dict[str, Any], *, to_cuda: bool
    ) -> Any:
        if not to_cuda:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_to_copy":
            self._copied(tensors[0], "cuda", kwargs.get("non_blocking", False))
        self._launched(func, name)
        return func(*args, **kwargs)

    def _hold(self, values: Any, *, before: bool) -> None:
        """Count the bytes of what lives on the device, until it dies; what an operation is given was there before."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    size = storage.nbytes()
                    self._born(storage, size)
                    self._before += size if before else 0
                    self._bytes += 0 if before else size
                    self._most = max(self._most, self._bytes)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage that was given another size."""
        if storage._cdata not in self._alive:
            self._born(storage, 0)
        self._bytes += size - self._alive[storage._cdata]
        self._alive[storage._cdata] = size
        self._most = max(self._most, self._bytes)

    def _born(self, storage: torch.UntypedStorage, size: int) -> None:
        self._alive[storage._cdata] = size
        weakref.finalize(storage, self._died, storage._cdata)

    def _died(self, storage: int) -> None:
        self._bytes -= self._alive.pop(storage)

    def _index(self, index: Any) -> Any:
        if index is None:
            return None
        if index.dtype in (torch.bool, torch.uint8):
            self._stalls("boolean index")
            return torch.empty(max(1, index.numel() // 2), dtype=torch.int64, device=CUDA)
        if index.device.type == "cpu":
            self._stalls("index on the host")
            return torch.empty(index.shape, dtype=torch.int64, device=CUDA)
        return index

    def _copied(self, tensor: torch.Tensor, to: str, non_blocking: bool, into: torch.Tensor | None = None) -> None:
        what, host = f"to {to} at {where()}", tensor if to == "cuda" else into
        if not non_blocking:
            self.stalls[f"copy {what}"] += 1
        elif host is not None and host.untyped_storage()._cdata not in pinned:
            self.unpinned[what] += 1
        self.copies[what] += 1

    def _stalls(self, what: str) -> None:
        self.stalls[f"{what} at {where()}"] += 1

    def _launched(self, func: Any, name: str) -> None:
        if not func.is_view and name not in NO_KERNEL and func.namespace != "prim":
            self.operations[name] += 1
            self.launches[where()] += 1

    def report(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "launches": self.launches.total(),
            "stalls": dict(self.stalls),
            "copies": dict(self.copies),
            "unpinned": dict(self.unpinned),
            "mixed": dict(self.mixed),
            "by_line": dict(self.launches.most_common(12)),
            "operations": dict(self.operations.most_common(30)),
            "peak_bytes": self._most + self._before,
        }


def where() -> str:
    """The innermost lines of ours on the stack."""
    lines: list[str] = []
    frame: Any = sys._getframe()
    while frame is not None and len(lines) < 3:
        if frame.f_code.co_filename.startswith(SOURCES):
            lines.append(f"{frame.f_code.co_filename[len(SOURCES) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def fake() -> FakeTensorMode:
    """Tensors without memory, beside real ones of the host."""
    return FakeTensorMode(allow_non_fake_inputs=True)
