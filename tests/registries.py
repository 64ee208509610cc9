"""What a module of a user's adds to the framework's registries, taken away again: examples leave nothing behind."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

import trainer.compose  # noqa: F401  every schema of the package itself

Plugins.instance()  # Hydra registers its own once a process, at the first composition


def registries() -> list[dict[Any, Any] | list[Any]]:
    """Every table at the top of a module of the package, and Hydra's tree of choices, node by node."""
    package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "trainer"]
    named = [item for module in package for item in vars(module).items()]
    tables = [value for name, value in named if type(value) in (dict, list) and not name.startswith("__")]
    choices: list[dict[Any, Any]] = [ConfigStore.instance().repo]
    for group in choices:
        choices += [entry for entry in group.values() if isinstance(entry, dict)]
    return [*{id(table): table for table in [*tables, *choices]}.values()]


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Restore all registries afterwards, and forget the modules that were imported from below ``folder``."""
    before = [(table, table.copy()) for table in registries()]
    try:
        yield
    finally:
        for table, entries in before:
            table.clear()
            (table.extend if isinstance(table, list) else table.update)(entries)
        for name, module in list(sys.modules.items()):
            if folder in Path(getattr(module, "__file__", None) or "").parents:
                del sys.modules[name]
