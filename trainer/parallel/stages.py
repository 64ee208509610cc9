"""A stage of a model: consecutive layers, which pass hidden states on to the rank with the next ones (pipeline parallelism).

What other ranks have is replaced by modules that give their input on, so that a stage is called as the model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.parallel import distributed
from trainer.parallel.cuts import Cut, cut
from trainer.parallel.mesh import Axis, Mesh
from trainer.parallel.watchdog import awaiting

STREAMS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Formats that hidden states may travel in."""


class PassThrough(nn.Module):
    """In the place of what another stage has: gives its first argument."""

    def divide(self, *_: Any) -> None:
        """Nothing is here to divide."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Received(nn.Module):
    """In the embedding's place: gives the hidden states ``(B, T, d)`` that the stage before has sent, of this rank's tokens.

    Args:
        width: d.
        tied: The table, on the last stage of a model that reads it again as its output embedding.

    Attributes:
        links: By which they come.
        hidden: What the last forward gave.
    """

    links: StageLinks

    def __init__(self, width: int, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.width = width
        self.hidden: Tensor | None = None
        self.register_parameter("weight", tied)
        if tied is not None:
            # Both ends of a pipeline have it; the first one counts and writes it.
            self.cuts = {"weight": Cut(tuple(tied.shape), copies=Axis(1, 2))}

    def divide(self, mesh: Mesh) -> None:
        """Divide the table as the first stage divides it."""
        if self.weight is not None:
            cut(self, "weight", 0, mesh.tensor)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.links.receive((*tokens.shape, self.width)).requires_grad_(torch.is_grad_enabled())
        self.hidden = hidden
        return hidden


class Result(NamedTuple):
    """What a reader gave, in a form that travels: tensors, and JSON that says where they belong."""

    form: Any
    tensors: list[Tensor]

    @classmethod
    def of(cls, value: Any) -> Result:
        """Of tensors, numbers, texts and None, in tuples and lists.

        Raises:
            TypeError: if it is something else.
        """
        tensors: list[Tensor] = []
        return cls(_form(value, tensors), tensors)

    def value(self) -> Any:
        """What it was made of, detached; lists have become tuples."""
        return _value(self.form, iter(self.tensors))


def _form(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, tuple | list):
        return [_form(one, tensors) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a reader gave a {type(value).__name__}, which does not travel between stages; give tensors in tuples"
    )


def _value(form: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(form, list):
        return tuple(_value(one, tensors) for one in form)
    return next(tensors) if isinstance(form, dict) else form


def _shapes(form: Any) -> Iterator[tuple[torch.dtype, list[int]]]:
    """(format, shape) of every tensor in a form."""
    if isinstance(form, list):
        for one in form:
            yield from _shapes(one)
    elif isinstance(form, dict):
        yield getattr(torch, form["dtype"]), form["shape"]


class StageLinks:
    """What a stage exchanges with its neighbours, and with all stages of its pipeline.

    Hidden states and gradients have a group each: on a device what is sent waits for its receiver, and would hold up what
    comes the other way.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis, self.device = axis, distributed.world().device
        self.first, self.last = axis.rank == 0, axis.rank == axis.size - 1
        assert axis.group is not None
        self._hidden, self._gradients = axis.group, distributed.group_of(axis.members)
        self._host = distributed.group_of(axis.members, on_host=True)
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._sends: torch.dtype | None = None
        self._receives: torch.dtype | None = None

    def send(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage, which learns with the first ones what format they all have.

        Raises:
            TypeError: if they have another one than those before.
        """
        if self._sends is None:
            self._sends = hidden.dtype
            dist.send(torch.tensor([STREAMS.index(hidden.dtype)]), group=self._host, group_dst=self.axis.rank + 1)
        if hidden.dtype is not self._sends:
            raise TypeError(f"hidden states are {hidden.dtype}, and the next stage expects {self._sends}")
        self._send(hidden, self._hidden, self.axis.rank + 1)

    def receive(self, shape: Sequence[int]) -> Tensor:
        """Hidden states of a shape from the stage before."""
        if self._receives is None:
            number = torch.zeros(1, dtype=torch.int64)
            dist.recv(number, group=self._host, group_src=self.axis.rank - 1)
            self._receives = STREAMS[int(number)]
        hidden = torch.empty(*shape, dtype=self._receives, device=self.device)
        return self._receive(hidden, self._hidden, self.axis.rank - 1)

    def send_gradient(self, gradient: Tensor) -> None:
        """Send the gradient of hidden states to the stage that they came from."""
        self._send(gradient, self._gradients, self.axis.rank - 1)

    def receive_gradient(self, hidden: Tensor) -> Tensor:
        """The gradient of hidden states that were sent to the next stage."""
        return self._receive(torch.empty_like(hidden), self._gradients, self.axis.rank + 1)

    def wait(self) -> None:
        """Wait until everything that was sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def swapped(self, tensor: Tensor) -> Tensor:
        """The other end's tensor of the same shape; on the first and on the last stage."""
        groups = (self._hidden, self._gradients) if self.first else (self._gradients, self._hidden)
        other = self.axis.size - 1 if self.first else 0
        self._send(tensor, groups[0], other)
        received = self._receive(torch.empty_like(tensor), groups[1], other)
        self.wait()  # whoever asks may go on to write to what was sent
        return received

    def spread(self, results: Sequence[Result]) -> list[Result]:
        """The last stage's ``results``, on every stage."""
        root = self.axis.size - 1
        text = self._text(json.dumps([result.form for result in results]) if self.last else "")
        forms = json.loads(text)
        places = [(dtype, shape) for form in forms for dtype, shape in _shapes(form)]
        ends, total = list[int](), 0
        for dtype, shape in places:
            total += dtype.itemsize * torch.Size(shape).numel()
            ends.append(total)
        memory = torch.empty(total, dtype=torch.uint8, device=self.device)
        if self.last:
            tensors = (tensor.to(self.device).contiguous().view(-1) for result in results for tensor in result.tensors)
            memory = torch.cat([memory[:0], *(tensor.view(torch.uint8) for tensor in tensors)])
        if total:
            dist.broadcast(memory, group=self._hidden, group_src=root)
        if self.last:
            return list(results)
        # Copies: where a tensor begins among the bytes need not be where its format may begin.
        starts = [0, *ends[:-1]]
        arrived = iter(
            memory[start:end].clone().view(dtype).view(shape)
            for (dtype, shape), start, end in zip(places, starts, ends, strict=True)
        )
        return [Result(form, [next(arrived) for _ in _shapes(form)]) for form in forms]

    def broadcast(self, tensor: Tensor, stage: int) -> Tensor:
        """A stage's tensor on every stage; elsewhere ``tensor`` is the memory that it is written to."""
        if tensor.numel():
            # As bytes: what carries tensors between CPUs does not know every format.
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self._hidden, group_src=stage)
        return tensor

    def _text(self, text: str) -> str:
        """The last stage's text, by way of the hosts: no device is waited for."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(own)])
        dist.broadcast(size, group=self._host, group_src=self.axis.size - 1)
        memory = own if self.last else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(memory, group=self._host, group_src=self.axis.size - 1)
        return memory.numpy().tobytes().decode()

    def _send(self, tensor: Tensor, group: dist.ProcessGroup, stage: int) -> None:
        self._sent = [(work, memory) for work, memory in self._sent if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        if tensor.numel() and (work := dist.isend(tensor, group=group, group_dst=stage)) is not None:
            self._sent.append((work, tensor))

    def _receive(self, memory: Tensor, group: dist.ProcessGroup, stage: int) -> Tensor:
        if memory.numel() and (work := dist.irecv(memory, group=group, group_src=stage)) is not None:
            with awaiting(self.axis.members[stage]):
                work.wait()
        return memory


class LeftStageError(Exception):
    """The forward of this stage is over; what comes of it is known once the last stage has told."""


@dataclass
class MicroBatch:
    """A micro-batch on its way through a stage.

    Args:
        batch: What is learnt from or measured.
        received: Hidden states of the stage before, whose gradient it waits for.
        hidden: What was sent to the next stage, with its graph.
        result: What the reader on the last stage gave; None until it is known here.
        outcome: What the caller's function gave.
    """

    batch: Batch
    received: Tensor | None = None
    hidden: Tensor | None = None
    result: Result | None = None
    outcome: Any = None


class StagedModel(nn.Module):
    """What is called in the place of a model of which this rank has a stage.

    A call gives what the reader gives on the last stage, on every stage: it is collective in a replica. While a
    `MicroBatch` passes, a stage that is not the last one leaves the function that called it as soon as its part is sent;
    called again once the result is known, the function gets that.

    Attributes:
        staged: True: a forward exchanges with other ranks by way of the host.
    """

    staged = True

    def __init__(self, module: nn.Module, links: StageLinks) -> None:
        super().__init__()
        self.module, self.links = module, links
        self._entries = [part for part in module.modules() if isinstance(part, Received)]
        for entry in self._entries:
            entry.links = links
        self._passing: MicroBatch | None = None
        self._called = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @contextmanager
    def passing(self, micro: MicroBatch) -> Iterator[None]:
        """Let a micro-batch pass: what is called inside is called for it, once."""
        self._passing, self._called = micro, False
        try:
            yield
        finally:
            self._passing = None

    def forward(self, tokens: Tensor, *inputs: Any) -> Any:
        micro = self._passing
        if micro is None:
            _, out = self._compute(tokens, *inputs)
            [result] = self.links.spread([Result.of(out)])
            self.links.wait()
            return out if self.links.last else result.value()
        if self._called:
            raise RuntimeError(
                "a loss called the trained model twice for a micro-batch, which a pipeline passes on once"
            )
        self._called = True
        if micro.result is not None:
            return micro.result.value()
        micro.received, out = self._compute(tokens, *inputs)
        if self.links.last:
            micro.result = Result.of(out)
            return out
        micro.hidden = out
        raise LeftStageError

    def _compute(self, tokens: Tensor, *inputs: Any) -> tuple[Tensor | None, Any]:
        """What this stage was sent, and what it makes of it, which is sent on."""
        out = self.module(tokens, *inputs)
        received = None
        for entry in self._entries:
            received, entry.hidden = entry.hidden, None
        if not self.links.last:
            self.links.send(out)
        return received, out


def one_forward_one_backward(stage: int, stages: int, count: int) -> Iterator[tuple[bool, int]]:
    """(whether a forward, else a backward; which micro-batch) of ``count`` in a stage's order.

    PipeDream-Flush (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): a stage keeps as many micro-batches under way as
    there are stages from it to the end.
    """
    ahead = min(stages - 1 - stage, count)
    for number in range(count + ahead):
        if number < count:
            yield True, number
        if number >= ahead:
            yield False, number - ahead
