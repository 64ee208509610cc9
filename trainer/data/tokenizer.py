"""One small interface to tokenizers; SentencePiece models are turned into ``tokenizer.json`` once, and run as that.

So what a run trains on, what its export holds and what ``transformers`` makes of the export are one definition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from trainer.config import ConfigError, Node, schema, setting
from trainer.data import sentencepiece_format, tekken_format
from trainer.data.hub import absence, folder_of
from trainer.data.tokenizer_files import INHERITED, ROLES, locate, settings_of
from trainer.disk import is_pointer, write_text

ENDS = ("add_bos_token", "add_eos_token")
GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers of which ``transformers`` heeds the definition alone, not `ENDS`."""


@schema("tokenizer")
@dataclass
class TokenizerChoice(Node):
    """Which tokenizer."""

    path: str | None = setting(
        None, "a folder with tokenizer.json, tokenizer.model or tekken.json; null = model.path's, or the data's"
    )
    add: list[str] = setting(
        list, "new special tokens, such as <|im_start|>; a loaded model's embeddings grow by a trained row for each"
    )

    def __post_init__(self) -> None:
        self.path = None if self.path is None else folder_of(self.path)

    def problems(self) -> Iterator[str]:
        for name in self.add:
            if not name.strip() or name != name.strip():
                yield f"tokenizer.add: {name!r} is empty or has white space around it; name tokens such as <|im_end|>"
        if self.path is not None and (absent := absence(self.path)):
            yield f"tokenizer.path={self.path}: {absent}"
        elif self.path is not None:
            try:
                locate(Path(self.path))
            except ConfigError as error:
                yield from error.problems


class Tokenizer:
    """Text to ids and back.

    ``bos``, ``eos``, ``pad``: ids; ``pad`` is ``eos`` where the tokenizer has none of its own (masks come from lengths, never
    from ids, so nothing depends on it).
    ``chat_template``: Jinja source or None.
    ``named_templates``: further ones, such as ``tool_use``.
    ``stops``: ids that end a generation.
    ``new_tokens``: how many `extended` added; they have the last ids.
    """

    def __init__(self, definition: str, settings: dict[str, Any]) -> None:
        self._definition, self._settings = _with_ends(definition, settings), settings
        self._backend = _backend_of(self._definition)
        # Text of users and data must not become control tokens: here a special token's name is just text.
        self._plain = _backend_of(self._definition)
        self._plain.encode_special_tokens = True
        self._without: dict[frozenset[str], tokenizers.Tokenizer] = {}
        self.bos = self._id("bos_token")
        eos = self._id("eos_token")
        if eos is None:
            raise ConfigError(["the tokenizer names no eos_token; add it to tokenizer_config.json"])
        self.eos: int = eos
        pad = self._id("pad_token")
        self.pad: int = self.eos if pad is None else pad
        self.chat_template: str | None = settings.get("chat_template")
        self.named_templates: dict[str, str] = dict(settings.get("named_templates", {}))
        self.stops: tuple[int, ...] = tuple(dict.fromkeys((self.eos, *settings.get("stops", ()))))
        self.new_tokens = 0

    def extended(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with further special tokens; those that it has keep their ids."""
        if not names:
            return self
        backend = tokenizers.Tokenizer.from_str(self._definition)
        backend.add_special_tokens(list(names))
        extended = Tokenizer(backend.to_str(), self._settings)
        extended.new_tokens = extended.vocab_size - self.vocab_size
        return extended

    def with_own_pad(self) -> Tokenizer:
        """This tokenizer with a padding token that no text has: a scorer finds the last real token by it.

        Raises:
            ConfigError: if every special token means something else.
        """
        taken = {self.bos, self.eos, *self.stops}
        if self.pad not in taken:
            return self
        spare = [n for n in sorted(self.specials) if self._backend.token_to_id(n) not in taken]
        spare = [n for n in spare if "pad" in n or "endoftext" in n] or spare
        if not spare:
            raise ConfigError(["the tokenizer has no special token left to pad with; use tokenizer.add=['<pad>']"])
        padded = Tokenizer(self._definition, {**self._settings, "pad_token": spare[0]})
        padded.new_tokens = self.new_tokens
        return padded

    @property
    def definition(self) -> dict[str, Any]:
        """The content of its ``tokenizer.json``."""
        return dict(json.loads(self._definition))

    @cached_property
    def specials(self) -> frozenset[str]:
        """Names of the special tokens."""
        return frozenset(t["content"] for t in json.loads(self._definition)["added_tokens"] if t["special"])

    @cached_property
    def added(self) -> frozenset[str]:
        """Names of all added tokens, special or not."""
        return frozenset(t["content"] for t in json.loads(self._definition)["added_tokens"])

    @property
    def role_names(self) -> dict[str, str | None]:
        """Names of the BOS, EOS, padding and unknown tokens: ``bos``, ``eos``, ``pad``, ``unk``."""
        return {role.removesuffix("_token"): self._settings.get(role) for role in ROLES}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether it is made to put BOS before a text of its own accord, as it then does in ``transformers``."""
        return self.bos is not None and self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos]

    @property
    def pieces(self) -> dict[str, int]:
        """The id of every piece, special tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that decides how text becomes ids."""
        ids = json.dumps([self.bos, self.eos, self.pad])
        return hashlib.sha256(f"{self._without_ends}{ids}".encode()).hexdigest()[:16]

    def ids_as(self, other: Tokenizer) -> bool:
        """Whether text becomes the same ids as with another tokenizer; which of them pads does not matter."""
        return self._without_ends == other._without_ends

    @cached_property
    def _without_ends(self) -> str:
        """The definition as it was before its settings had it add BOS or EOS, which we put where we want them."""
        if not any(self._settings.get(key) for key in ENDS):
            return self._definition
        backend = tokenizers.Tokenizer.from_str(self._definition)
        backend.post_processor = None
        return str(backend.to_str())

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of ``text``, without added BOS or EOS. ``specials``: names of special tokens become their ids."""
        backend = self._backend if specials else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str, *, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and the characters of ``text`` that each id stands for (first, last exclusive)."""
        encoding = (self._backend if specials else self._plain).encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def encode_as_text(self, text: str, names: frozenset[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_with_offsets`, where none of the added tokens ``names`` becomes its id."""
        if names not in self._without:
            definition = json.loads(self._definition)
            for token in definition["added_tokens"]:
                token["special"] |= token["content"] in names
            self._without[names] = _backend_of(json.dumps(definition))
            self._without[names].encode_special_tokens = True
        encoding = self._without[names].encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [list(e.ids) for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Text of ``ids``; special tokens are left out unless ``specials``."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not specials))

    def token_bytes(self) -> Tensor:
        """Bytes of UTF-8 text that each id stands for ``(V,)`` int64: special tokens 0."""
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> Tensor:
        definition = json.loads(self._definition)
        byte_level = '"ByteLevel"' in json.dumps([definition["pre_tokenizer"], definition["decoder"]])
        special = {t["id"] for t in definition["added_tokens"] if t["special"]}
        added = {t["id"] for t in definition["added_tokens"]}
        sizes = torch.zeros(self.vocab_size, dtype=torch.int64)
        for piece, number in self._backend.get_vocab(with_added_tokens=True).items():
            if number in special:
                continue
            if byte_level and number not in added:
                sizes[number] = len(piece)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                sizes[number] = 1
            else:
                sizes[number] = len(piece.replace("\u2581", " ").encode())
        return sizes

    def save(self, folder: Path) -> None:
        """Write the files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
        write_text(folder / "tokenizer.json", self._definition)
        settings = {
            **{key: self._settings[key] for key in (*ROLES, *INHERITED) if self._settings.get(key) is not None},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
        }
        if self.chat_template is not None:
            named = {"default": self.chat_template, **self.named_templates}
            every = [{"name": name, "template": text} for name, text in named.items()]
            settings["chat_template"] = every if self.named_templates else self.chat_template
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _id(self, role: str) -> int | None:
        name = self._settings.get(role)
        return None if name is None else self._backend.token_to_id(name)


def _backend_of(definition: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(definition)
    backend.no_truncation()
    backend.no_padding()
    return backend


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (``tokenizer.json``, else ``tokenizer.model``, else ``tekken.json``), or in one such file.

    Raises:
        ConfigError: if there is none, or it cannot be read.
    """
    file = locate(Path(path))
    stored = settings_of(file.parent)
    if is_pointer(file):
        raise ConfigError([f"{file} is a pointer of Git LFS, not the file; run git lfs pull in its folder"])
    added, tekken = stored.pop("added_tokens"), tekken_format.is_tekken(file)
    try:
        if file.suffix == ".model":
            definition, settings = sentencepiece_format.definition_of(file)
            definition = sentencepiece_format.with_added_tokens(definition, added)
        elif tekken:
            definition, settings = tekken_format.definition_of(file)
        else:
            definition, settings = file.read_text(encoding="utf-8"), {}
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file} is not UTF-8 ({error})"]) from None
    except Exception as error:  # a damaged tokenizer.model ends in protobuf's own
        raise ConfigError([f"{file}: {error}"]) from None
    settings.update(stored)
    if file.suffix == ".json" and not tekken and settings.pop("tokenizer_class", None) in GENERIC:
        if not added and '"byte_fallback":true' in definition and all(settings.get(key) is False for key in ENDS):
            settings["add_bos_token"] = True  # so said release 0.1 of all, and put BOS before documents
        elif '"TemplateProcessing"' not in definition or not settings.get("add_bos_token"):
            settings.pop("add_bos_token", None)
        settings.pop("add_eos_token", None)
    try:
        return Tokenizer(definition, settings)
    except ConfigError as error:
        raise ConfigError([f"{file}: {p}" for p in error.problems]) from None
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ConfigError([f"{file} is no tokenizer that can be read ({error})"]) from None


def _with_ends(definition: str, settings: Mapping[str, Any]) -> str:
    """A definition that adds BOS and EOS to a text where the settings say so, and not where they say not."""
    if all(settings.get(key) is None for key in ENDS):
        return definition
    backend = tokenizers.Tokenizer.from_str(definition)
    names = [settings.get(key.removeprefix("add_")) if settings.get(key) else None for key in ENDS]
    ends = [(name, backend.token_to_id(name)) for name in names if name and backend.token_to_id(name) is not None]
    if backend.encode("", add_special_tokens=True).ids == [number for _, number in ends]:
        return definition
    bos, eos = (name if (name, backend.token_to_id(name or "")) in ends else None for name in names)
    single, pair = " ".join(filter(None, (bos, "$A", eos))), " ".join(filter(None, (bos, "$A", eos, bos, "$B:1", eos)))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single, pair, special_tokens=ends)
    return str(backend.to_str())
