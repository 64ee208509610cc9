"""The files of a tokenizer's folder: which one defines it, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

DEFINITIONS = ("tokenizer.json", "tokenizer.model", "tekken.json")
"""Files that define a tokenizer, the first that is there."""
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
INHERITED = (
    "model_max_length", "padding_side", "truncation_side", "add_bos_token", "add_eos_token", "model_input_names",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
"""Settings of a folder's ``tokenizer_config.json`` that its exports have, too, as far as it has them."""


def locate(path: Path) -> Path:
    """The file that defines a tokenizer: one of a folder's `DEFINITIONS`, or the file itself.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    for name in DEFINITIONS:
        if (path / name).is_file():
            return path / name
    *first, last = DEFINITIONS
    raise ConfigError([f"tokenizer.path={path} holds no tokenizer; give a folder with {', '.join(first)} or {last}"])


def settings_of(folder: Path) -> dict[str, Any]:
    """Names of the special tokens, what exports inherit, templates, ids that end a generation (``stops``).

    Under ``added_tokens``, by id: the name of each token beside a ``tokenizer.model`` and whether it is special.

    Raises:
        ConfigError: naming the file that is damaged.
    """
    settings: dict[str, Any] = {}
    named: dict[str, str] = {}
    with _damage(folder / "added_tokens.json") as file:
        added = {int(number): (name, True) for name, number in _stored(file).items()}
    for name in ("chat_template.json", "special_tokens_map.json", "tokenizer_config.json"):
        with _damage(folder / name) as file:
            stored = _stored(file)
            roles = {role: stored[role] for role in ROLES if stored.get(role) is not None}
            settings |= {role: value["content"] if isinstance(value, dict) else value for role, value in roles.items()}
            settings |= {
                k: stored[k] for k in ("chat_template", "tokenizer_class", *INHERITED) if stored.get(k) is not None
            }
            decoder = stored.get("added_tokens_decoder") or {}
            added |= {int(number): (token["content"], bool(token.get("special"))) for number, token in decoder.items()}
            named = named if stored.get("chat_template") is None else _templates(settings)
    if (folder / "chat_template.jinja").is_file():
        with _damage(folder / "chat_template.jinja") as file:
            settings["chat_template"] = file.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        with _damage(path) as file:
            named[file.stem] = file.read_text(encoding="utf-8")
    return {**settings, "named_templates": named, "stops": _stops(folder), "added_tokens": added}


def _templates(settings: dict[str, Any]) -> dict[str, str]:
    """The templates beside the usual one, which alone stays in ``settings``.

    Raises:
        TypeError: if one is no text.
    """
    every = settings.get("chat_template")
    named: dict[str, Any] = {t["name"]: t["template"] for t in every} if isinstance(every, list) else {"default": every}
    if wrong := [text for text in named.values() if not isinstance(text, str | None)]:
        raise TypeError(f"a chat template is {type(wrong[0]).__name__}, not text")
    if isinstance(every, list):
        settings["chat_template"] = named.get("default")
    return {name: text for name, text in named.items() if name != "default"}


def _stops(folder: Path) -> list[int]:
    """The ids that end a generation, as the model of the same folder has them."""
    with _damage(folder / "generation_config.json") as file:
        ends = _stored(file).get("eos_token_id")
    return [n for n in (ends if isinstance(ends, list) else [ends]) if isinstance(n, int)]


@contextmanager
def _damage(file: Path) -> Iterator[Path]:
    """Name a file that is cut off, or whose content has another form.

    Raises:
        ConfigError: for everything that such content makes what reads it raise.
    """
    try:
        yield file
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"{file} is damaged or has another form ({why}); was its download cut off?"]) from None


def _stored(file: Path) -> dict[str, Any]:
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(stored, dict):
        raise TypeError("it holds no settings by name")
    return stored
