"""Checkpoints that any number of ranks and any strategy restores: atomic, verified, made of fragments of named tensors."""

from trainer.checkpoint.checkpointer import Checkpointer, Checkpoints, Part
from trainer.checkpoint.folder import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "Checkpoints", "Part"]
