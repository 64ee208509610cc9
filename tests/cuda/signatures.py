"""What torch's functions for CUDA and for ranks take, version by version: those of versions not installed here lie in a file.

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
from torch.distributed.fsdp import FSDPModule

HERE = Path(__file__).parent
FILE = HERE / "signatures.json"
MODULES = (
    "torch.cuda", "torch.cuda.memory", "torch.cuda.graphs", "torch.nn.attention", "torch.nn.attention.varlen",
    "torch.backends.cuda", "torch.distributed", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "torch.distributed.fsdp._fully_shard._fsdp_common", "torch.distributed.rendezvous", "torch.distributed.tensor",
    "torch.nn.functional", "torch.nn.parallel", "torch.utils", "torch.utils.checkpoint",
)  # fmt: skip
FSDP = "torch.distributed.fsdp.FSDPModule"
CLASSES = ("torch.distributed.device_mesh.DeviceMesh", FSDP)
UNIT_METHODS = vars(FSDPModule).keys()
MARKS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def installed() -> dict[str, str | None]:
    """By full name what a function takes, as `bind` reads it; None where Python cannot say."""
    names: dict[str, str | None] = {}
    for module in MODULES:
        for name, value in vars(importlib.import_module(module)).items():
            if callable(value) and str(getattr(value, "__module__", "")).startswith("torch"):
                names[f"{module}.{name}"] = _written(value)
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        names.update(
            {f"{path}.{method}": _written(getattr(kind, method)) for method in vars(kind) if method[:2] != "__"}
        )
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
    """(full name, positional arguments, keywords) of the calls in a file whose names lie in `MODULES` or `CLASSES`."""
    tree = ast.parse(file.read_text())
    imported = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            head, _, rest = ast.unparse(node.func).partition(".")
            name = ".".join(filter(None, (imported.get(head, head), rest)))
            given = len(node.args), [k.arg for k in node.keywords if k.arg is not None]
            if name.rpartition(".")[0] in (*MODULES, *CLASSES):
                yield name, *given
            elif FSDP in imported.values() and (method := name.rpartition(".")[2]) in UNIT_METHODS:
                yield f"{FSDP}.{method}", given[0] + 1, given[1]  # of an object, itself the first argument


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """By the name that a file calls it, what it imports of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname is not None)


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    known[torch.__version__.partition("+")[0]] = installed()
    FILE.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
