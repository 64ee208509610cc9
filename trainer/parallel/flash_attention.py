"""FlashAttention 3 (Shah et al. 2024, arXiv:2407.08608) on the GPUs that it is for, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

log = logging.getLogger(__name__)

MODULE = "flash_attn_interface"
"""What FlashAttention 3 installs, and PyTorch looks for."""
CAPABILITY = 9
"""Hopper's: H100, H200, GH200. PyTorch refuses these kernels on older GPUs and on newer ones."""


@contextmanager
def fastest_attention(device: torch.device, *, same_bytes: bool) -> Iterator[str | None]:
    """Let attention in bfloat16 and float16 take FlashAttention 3 inside, where it can, in the place of PyTorch's own 2.

    ``same_bytes``: stay with 2, whose backward has a fixed order: 3 was released without one for some sizes of heads.
    Gives a line about what attention takes, None on GPUs that have no choice.
    """
    # An AMD GPU of capability 9 is another architecture.
    hopper = device.type == "cuda" and torch.version.hip is None
    if not hopper or torch.cuda.get_device_properties(device).major != CAPABILITY or current_flash_attention_impl():
        yield None
    elif same_bytes:
        yield "attention by FlashAttention 2, whose backward has a fixed order: deterministic=true"
    elif importlib.util.find_spec(MODULE) is None:
        yield f"attention by FlashAttention 2; 3 is faster on this GPU, and is taken where {MODULE} is installed"
    elif (broken := _activate()) is not None:
        remedy = f"build FlashAttention 3 for torch {torch.__version__}, or uninstall it"
        log.warning(
            "attention by FlashAttention 2: %s is installed and cannot be used (%s); %s", MODULE, broken, remedy
        )
        yield None
    else:
        try:
            yield f"attention by FlashAttention 3 ({MODULE})"
        finally:
            restore_flash_attention_impl()


def _activate() -> str | None:
    """Take FlashAttention 3 from now on; gives what went wrong instead."""
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch, or without a backward
        return f"{type(error).__name__}: {error}"
    return None
