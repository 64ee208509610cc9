"""The files of a tokenizer's folder: which one defines it, and what stands beside it."""

from __future__ import annotations

import json
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
    """What stands beside a tokenizer, in whichever files a folder has.

    Names of the special tokens, what exports inherit, templates, ids that end a generation; and under
    ``added_tokens``, by id, the name of each token beside a ``tokenizer.model`` and whether it is special.

    Raises:
        ConfigError: naming a file that is damaged.
    """
    settings: dict[str, Any] = {}
    added = {number: (name, True) for name, number in _stored(folder / "added_tokens.json").items()}
    for file in ("chat_template.json", "special_tokens_map.json", "tokenizer_config.json"):
        stored = _stored(folder / file)
        roles = {role: stored[role] for role in ROLES if stored.get(role) is not None}
        settings |= {role: value["content"] if isinstance(value, dict) else value for role, value in roles.items()}
        settings |= {
            k: stored[k] for k in ("chat_template", "tokenizer_class", *INHERITED) if stored.get(k) is not None
        }
        decoder = stored.get("added_tokens_decoder") or {}
        added |= {int(number): (token["content"], bool(token.get("special"))) for number, token in decoder.items()}
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    named: dict[str, str] = {}
    if isinstance(settings.get("chat_template"), list):
        named = {t["name"]: t["template"] for t in settings["chat_template"]}
        settings["chat_template"] = named.pop("default", None)
    named |= {f.stem: f.read_text() for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return {**settings, "named_templates": named, "stops": _stops(folder), "added_tokens": added}


def _stops(folder: Path) -> list[int]:
    """The ids that end a generation, as the model of the same folder has them."""
    ends = _stored(folder / "generation_config.json").get("eos_token_id")
    return [n for n in (ends if isinstance(ends, list) else [ends]) if isinstance(n, int)]


def _stored(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError([f"{file} is not JSON ({error}); was its download cut off?"]) from None
    if not isinstance(stored, dict):
        raise ConfigError([f"{file} holds no settings by name; was its download cut off?"])
    return stored
