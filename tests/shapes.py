"""Architectures by the settings that a model from scratch has."""

import dataclasses
from typing import Any

from trainer.models.architecture import Architecture
from trainer.models.shape import Shape, architecture_of


def architecture(vocab_size: int, *, scores: bool = False, **settings: Any) -> Architecture:
    """What a model of these settings is built as."""
    return dataclasses.replace(architecture_of(Shape(**settings), vocab_size), scores=scores)
