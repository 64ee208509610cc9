"""What torch's functions for CUDA take, version by version: those of versions that are not installed here lie in a file.

``python -m tests.cuda.signatures`` adds the installed version to it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
FILE = HERE / "signatures.json"
MODULES = (
    "torch.cuda", "torch.cuda.memory", "torch.cuda.graphs", "torch.nn.attention", "torch.nn.attention.varlen",
    "torch.backends.cuda",
)  # fmt: skip
MARKS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def installed() -> dict[str, str | None]:
    """By full name what a function takes, as `bind` reads it; None where Python cannot say."""
    names: dict[str, str | None] = {}
    for module in MODULES:
        for name, value in vars(importlib.import_module(module)).items():
            if callable(value) and str(getattr(value, "__module__", "")).startswith("torch"):
                names[f"{module}.{name}"] = _written(value)
    return names


def _written(function: object) -> str | None:
    """``a b= *c d= **e``: what is behind ``*`` goes by name only, and ``=`` has a default."""
    try:
        parameters = list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    words, named = list[str](), False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not named:
            words.append("*")
        named = named or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        words.append(MARKS.get(p.kind, "") + p.name + ("" if p.default is p.empty else "="))
    return " ".join(words)


def bind(written: str, positional: int, keywords: list[str]) -> None:
    """Call a function that takes ``written`` on paper.

    Raises:
        TypeError: if it does not take that many arguments, or one of these names.
    """
    parameters, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in written.split():
        name, default = word.strip("*="), None if word.endswith("=") else inspect.Parameter.empty
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif word.startswith("**"):
            parameters.append(inspect.Parameter(name, inspect.Parameter.VAR_KEYWORD))
        elif word.startswith("*"):
            parameters.append(inspect.Parameter(name, inspect.Parameter.VAR_POSITIONAL))
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            parameters.append(inspect.Parameter(name, kind, default=default))
    inspect.Signature(parameters).bind(*range(positional), **dict.fromkeys(keywords))


def calls(file: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(full name, positional arguments, keywords) of the calls in a file whose names lie in `MODULES`."""
    tree = ast.parse(file.read_text())
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            head, _, rest = ast.unparse(node.func).partition(".")
            name = ".".join(filter(None, (imported.get(head, head), rest)))
            if name.rpartition(".")[0] in MODULES:
                yield name, len(node.args), [k.arg for k in node.keywords if k.arg is not None]


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    known[torch.__version__.partition("+")[0]] = installed()
    FILE.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
