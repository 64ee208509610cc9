"""Reward functions that people name on a command line: where they are imported from, and the two ways to call them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx

from trainer.config import InputError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses of HTTP after which asking again may help."""
CONNECTION = (ConnectionError, TimeoutError, socket.gaierror, httpx.TransportError)
"""What ends a question to a server that is down, away or slow."""


def may_pass(error: BaseException | None) -> bool:
    """Whether an error may be gone at another attempt: a server did not answer, in whatever libraries made of it."""
    while error is not None:
        status = getattr(error, "code", getattr(getattr(error, "response", None), "status_code", None))
        if isinstance(error, CONNECTION) or (isinstance(status, int) and status in RETRIED):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_reward(name: str) -> Callable[..., Any]:
    """The reward ``f(prompts, completions, rows, **arguments)`` of a name: ``package.module.f`` or ``folder/file.py:f``.

    One of TRL's, ``f(completions, **kwargs)``, is called with the columns of the rows.

    Raises:
        InputError: if there is none.
    """
    module, _, function = name.rpartition(":" if ".py:" in name else ".")
    try:
        loaded = _file(Path(module)) if module.endswith(".py") else importlib.import_module(module or "builtins")
    except Exception as error:  # whatever the module itself raises
        remedy = "is its folder on PYTHONPATH? A file works too: my_rewards.py:brevity"
        raise InputError(f"function={name} cannot be imported ({type(error).__name__}: {error}); {remedy}") from None
    value = getattr(loaded, function, None)
    if not callable(value):
        own = [key for key, v in vars(loaded).items() if inspect.isfunction(v) and v.__module__ == loaded.__name__]
        has = f"it has {', '.join(own)}" if own else "it has no function"
        raise InputError(f"function={name} is not a function; {module} has none called {function}, {has}")
    return by_columns(value) if takes_columns(value) else value


def _file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    name = f"onecurve_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses of the file look themselves up
    spec.loader.exec_module(module)
    return module


def takes_columns(function: Callable[..., Any]) -> bool:
    """Whether it is called as TRL calls its rewards: ``completions`` and columns by keyword, and no ``rows``."""
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return open_ended and "completions" in parameters and "rows" not in parameters


def by_columns(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward of TRL's as one of ours: prompts and completions are lists of messages where the rows' prompts are."""

    def reward(
        prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]], **more: Any
    ) -> Any:
        names = dict.fromkeys(key for row in rows for key in row)
        columns = {key: [row.get(key) for row in rows] for key in names}
        asked, answers = list[Any](prompts), list[Any](completions)
        for n, row in enumerate(rows):
            if isinstance(row.get("prompt"), list):
                asked[n], answers[n] = row["prompt"], [{"role": "assistant", "content": completions[n]}]
        return function(**{**columns, "prompts": asked, "completions": answers, **more})

    return reward
