"""What is chosen for a model of any shape."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Node, setting
from trainer.models.recompute import Recompute


@dataclass(frozen=True)
class ModelOptions(Node):
    """What is chosen for a model of any shape. A base of `Model` so that help names it before the shape."""

    path: str | None = setting(
        None, "a Hugging Face folder, an earlier export, or a hub id (owner/name); the shape below is then the folder's"
    )
    activation_checkpointing: Recompute | None = setting(
        Recompute.none,
        "what the backward computes again: none, selective (all but matrix products and attention), full (every block); "
        "null = the least that fits the device by the estimate",
    )
    compile: bool | None = setting(
        False, "torch.compile the blocks for training; null = on CUDA where everything else allows it"
    )
    vocab_size: int | None = setting(None, "tokens of the vocabulary; null = the tokenizer's", least=1)
    router_balance_loss: float | None = setting(
        None, "weight of the loss that spreads tokens over experts; null = 0.001 from scratch, 0 with a path", least=0
    )
    router_z_loss: float = setting(0.0, "weight of softmax routers' squared log-partition; 0.001 is usual", least=0)
    router_bias_rate: float | None = setting(
        None,
        "step of sigmoid routers' choice bias towards an even load; null = 0.001 from scratch, 0 with a path",
        least=0,
    )
