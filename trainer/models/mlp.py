"""What a block does to each token alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.architecture import Architecture
from trainer.models.linear import BlockLinear
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _squared_relu,
}
"""By Hugging Face's names."""
ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
"""Other names of the same."""


class MLP(nn.Module):
    """Three matrices, one of them a gate (SwiGLU and its kind; Shazeer 2020, arXiv:2002.05202), or two.

    Attributes:
        tensor: Ranks that each compute a part of the width.
    """

    tensor: Axis = UNDIVIDED

    def __init__(self, a: Architecture, width: int) -> None:
        super().__init__()
        if a.gated:
            self.gate_proj = BlockLinear(a.hidden_size, width, bias=a.mlp_bias)
        self.up_proj = BlockLinear(a.hidden_size, width, bias=a.mlp_bias)
        self.down_proj = BlockLinear(width, a.hidden_size, bias=a.mlp_bias)
        self.activation, self.gated = ACTIVATIONS[a.activation], a.gated

    def divide(self, mesh: Mesh) -> None:
        """Compute this rank's part of the width."""
        self.tensor = mesh.tensor
        if self.gated:
            self.gate_proj.divide_outputs(mesh.tensor)
        self.up_proj.divide_outputs(mesh.tensor)
        self.down_proj.divide_inputs(mesh.tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tensor.enter(x)
        if not self.gated:
            return self.down_proj(self.activation(self.up_proj(x)))  # type: ignore[no-any-return]
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
