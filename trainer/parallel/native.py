"""The step of engines that leave it to PyTorch's own optimizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.optim import applies_on_device, gradient_norm
from trainer.optim.eight_bit import Moment
from trainer.optim.state import create_state, moments, settle
from trainer.parallel.engine import Engine, Outcome


class NativeEngine(Engine):
    """Clipping and loss scaling ride on the fused optimizer's own pass."""

    @abstractmethod
    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers hold: this rank's parameters, or its parts of them, by logical name."""

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The norm of the gradient over all ranks, of which those of ``parameters`` are here."""
        return gradient_norm(parameters)

    def step(self, limit: Tensor | None = None) -> Outcome:
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        norm, applied, divisor = self.decide(self.norm(parameters), limit)
        if all(applies_on_device(o) for o in self.optimizers):
            self._step_fused(divisor, applied)
        elif bool(applied):
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
            for optimizer in self.optimizers:
                optimizer.step()
        self.scale.update(~torch.isfinite(norm))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, applied)

    def _step_fused(self, divisor: Tensor, applied: Tensor) -> None:
        """Divide, skip and update in the optimizers' own passes, without asking the device about the gradient."""
        for optimizer in self.optimizers:
            fused: Any = optimizer
            fused.grad_scale, fused.found_inf = divisor, (~applied).float()
            optimizer.step()

    def optimizer_steps(self) -> dict[str, float]:
        names = {id(tensor): name for name, tensor in self.trained()}
        states = ((p, s) for o in self.optimizers for p, s in o.state.items() if "step" in s)
        return {names[id(p)]: float(s["step"]) for p, s in states}

    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> float:
        for optimizer in self.optimizers:
            create_state(optimizer)
            for name, tensor in self.trained():
                if name in steps and "step" in (own := optimizer.state.get(tensor, {})):
                    own["step"].fill_(steps[name])
        self.scale.load(state.get("loss_scale", {}))
        return settle(self.optimizers)

    def states(self, tensor: Tensor) -> dict[str, Tensor | Moment]:
        """A tensor that the optimizers hold, as ``param``, and its moments."""
        views: dict[str, Tensor | Moment] = {"param": tensor}
        for optimizer in self.optimizers:
            if tensor in optimizer.state:
                views.update({name: optimizer.state[tensor][name] for name in moments(optimizer)})
        return views
