"""A model of a few hundred weights under an engine, with a checkpointer: what checkpoint tests save and restore."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.metrics import Metrics
from trainer.optim import AdamW, Muon
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3


class Net(nn.Module):
    """Two matrices, a tied one, a bias, a frozen matrix and a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, width)
        self.hidden = nn.Linear(width, width)
        self.frozen = nn.Linear(width, 3, bias=False).requires_grad_(False)
        self.lm_head = nn.Linear(width, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.hidden(self.embed_tokens(ids)))
        return self.lm_head(hidden).square().sum() + (self.frozen(hidden) * self.scale).sum()


class Counter:
    """A part of a run that counts."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


class Run:
    """Trains `Net`; every step is a function of the step's number and of the state."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        optimizer: str = "adamw",
        width: int = 8,
        strategy: str = "ddp",
        precision: Compute = Compute.fp32,
        **config: Any,
    ) -> None:
        kind = {"adamw": AdamW, "adamw8bit": partial(AdamW, state="8bit"), "muon": Muon}[optimizer]
        spread = {"ddp": DDP, "fsdp": FSDP, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3}[strategy]()
        with spread.construction():
            net = Net(width)
        spread.place(net, (), Precision(precision))
        for number, p in enumerate(net.parameters()):
            # What is frozen comes from where the model came from, so it does not depend on the seed.
            own = 100 * seed * p.requires_grad + number
            spread.fill(p, torch.randn(spread.shape_of(p), generator=torch.Generator().manual_seed(own)) / 3)
        self.engine = spread.wrap(net, kind(lr=0.05, weight_decay=0.1, clip=1.0), Precision(precision))
        self.counter = Counter()
        self.checkpointer = Checkpointer(
            Checkpoints(**config), folder, self.engine, {"counter": self.counter}, {"a": 1}
        )

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            ids = distributed.world().data.share(torch.tensor([(step + n) % 5 for n in range(4)]))

            def loss_of(batch: Any, ids: torch.Tensor = ids) -> Any:
                return self.engine.model(ids), Metrics()

            self.engine.accumulate(loss_of, [Nothing()], torch.tensor(4.0))
            self.engine.step()
            self.counter.value = step

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a restore must give back: whole parameters, buffers and moments, and step counts. Collective."""
        pieces = [
            [f.name, f.state, list(f.shape), f.start, f.tensor.tolist()] for f in self.engine.fragments(owned=True)
        ]
        whole: dict[str, np.ndarray] = {}
        for name, state, shape, start, values in (p for part in distributed.gather(pieces) for p in part):
            flat = whole.setdefault(f"{name}/{state}", np.full(int(np.prod(shape)), np.nan, dtype=np.float32))
            flat[start : start + len(values)] = values
        steps = {
            f"{n}/step": np.array(s)
            for part in distributed.gather(self.engine.optimizer_steps())
            for n, s in part.items()
        }
        return {**whole, **steps, "counter": np.array(self.counter.value)}


class Nothing:
    """A micro-batch that `Net` does not look at."""

    def to(self, device: torch.device) -> "Nothing":
        return self


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
