"""The package bitsandbytes, imported where it is needed: it takes seconds."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

from trainer.config import ConfigError

PACKAGE = "bitsandbytes"


def absent_library(need: str) -> str | None:
    """What is missing for what ``need`` says, with the remedy; None where the package is installed."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    return f"{need} needs the package {PACKAGE}: pip install 'onecurve[quant]'"


@cache
def library(need: str) -> Any:
    """``bitsandbytes.functional``, without its plea for the package ``kernels``; also loads its operators.

    Raises:
        ConfigError: if it is not installed.
    """
    if absent := absent_library(need):
        raise ConfigError([absent])
    logging.getLogger(f"{PACKAGE}.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module(f"{PACKAGE}.functional")
