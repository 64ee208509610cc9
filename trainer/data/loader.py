"""The order of data: a function of (seed, epoch, position), never of the number of ranks."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.batch import Batch
from trainer.config import ConfigError
from trainer.data.store import UnitStore

AHEAD = 2
"""Micro-batches that are made before they are asked for."""


def permuted(index: int, size: int, key: str) -> int:
    """The place of ``index`` in a permutation of ``range(size)`` that ``key`` selects.

    A Feistel network over the next even number of bits, walked until it lands inside (Black & Rogaway 2002): constant time
    and memory, however large ``size`` is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}:{turn}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & low)
        index = left << half | right
        if index < size:
            return index


class Prefetched:
    """Micro-batches made by a thread ahead of their use; what fails there is raised where it is asked for.

    ``produce(state)`` yields (micro-batch, state after it); the state of what was *consumed* is what a checkpoint holds.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._thread: threading.Thread | None = None
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stop = threading.Event()

    def produce(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless micro-batches from ``state`` on."""
        raise NotImplementedError(f"{type(self).__name__} produces nothing")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._start()
        kind, value = self._queue.get()
        if kind == "error":
            self._thread = None
            raise value
        batch, self._state = value
        return batch  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind what was consumed.

        Raises:
            ConfigError: if the state is of other data.
        """
        if state["fingerprint"] != self._state["fingerprint"]:
            raise ConfigError(
                ["the checkpoint comes from other data, tokenizer or batch.length; restore them, or resume=new"]
            )
        self.close()
        self._state = dict(state)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """What is learnt does not change what comes next."""

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._thread = None

    def _start(self) -> None:
        self._stop, self._queue = threading.Event(), queue.Queue(AHEAD)
        arguments = (self.produce, dict(self._state), self._queue, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, daemon=True, name="data")
        self._thread.start()


def _fill(produce: Callable[..., Any], state: dict[str, Any], out: queue.Queue[Any], stop: threading.Event) -> None:
    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in produce(state):
            if not put(("batch", item)):
                return
    except Exception as error:
        put(("error", error))


class Loader(Prefetched):
    """This rank's micro-batches of ``micro`` rows, endlessly, in the order of a keyed permutation of every epoch.

    Micro-batch m of the run covers positions ``m * micro * ranks`` and on; rank r takes every ``ranks``-th of them from the
    r-th. So a step's rows are the same for any number of ranks, and the state is one integer.
    """

    def __init__(self, rows: Mixture, *, micro: int, seed: int, rank: int, ranks: int) -> None:
        self.rows, self.micro, self.seed, self.rank, self.ranks = rows, micro, seed, rank, ranks
        super().__init__({"position": 0, "fingerprint": rows.fingerprint})

    def number(self, position: int) -> int:
        """The number of the row at a position of the whole run."""
        epoch, index = divmod(position, len(self.rows))
        return self.rows.resolve(epoch, permuted(index, len(self.rows), f"{self.seed}:{epoch}"))

    def produce(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        position = state["position"]
        while True:
            numbers = [self.number(position + self.rank + n * self.ranks) for n in range(self.micro)]
            position += self.micro * self.ranks
            yield self.rows.collate(numbers), {**state, "position": position}


class Mixture:
    """Units of several sources in one epoch.

    ``parts``: the sources' units.
    ``passes``: how often each source's units come in an epoch. Half a pass takes one half of a source in one epoch and the
    other half in the next.
    """

    def __init__(self, parts: Sequence[UnitStore], passes: Sequence[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        self.counts = [max(1, round(len(part) * times)) for part, times in zip(parts, passes, strict=True)]
        mixed = [f"{part.fingerprint}:{count}" for part, count in zip(parts, self.counts, strict=True)]
        self.fingerprint = hashlib.sha256("\0".join(mixed).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        """Units an epoch."""
        return sum(self.counts)

    def resolve(self, epoch: int, index: int) -> int:
        """The unit at a place of an epoch: its number, counted through all sources."""
        before = 0
        for number, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            size = len(part)
            if index < count:
                turn, place = divmod(epoch * count + index, size)
                return before + (place if count == size else permuted(place, size, f"{self.seed}:{number}:{turn}"))
            index -= count
            before += size
        raise IndexError(f"no unit {index} in an epoch of {len(self)}")

    def collate(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of the units with these numbers."""
        return self.parts[0].join([self._unit(n) for n in numbers], numbers)

    def _unit(self, number: int) -> Any:
        for part in self.parts:
            if number < len(part):
                return part.unit(number)
            number -= len(part)
        raise IndexError(f"no unit {number}")

    def loader(self, *, micro: int, seed: int, rank: int, ranks: int) -> Loader:
        """This rank's endless micro-batches."""
        return Loader(self, micro=micro, seed=seed, rank=rank, ranks=ranks)
