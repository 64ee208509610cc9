"""Tiny world as the data of a run: it needs no files, and its tokenizer is trained at first use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainer.config import schema, setting
from trainer.data.corpus import Corpus, Data, summaries
from trainer.data.loader import Mixture
from trainer.data.rows import RowStore, prepare_rows, tokenize
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.data.tokenizer_training import train
from trainer.tinyworld.language import VERSION, TinyWorld

HELDOUT = 1 << 40
"""Held-out documents are counted from here."""
TOKENIZER = {"vocab_size": 512, "documents": 2000}
CHAT_SPECIALS = ("<|im_start|>", "<|im_end|>")


@schema("data/tinyworld")
@dataclass
class TinyWorldData(Data):
    """A generated language of short stories whose entropy is known: the floor of the loss."""

    documents: int = setting(20000, "stories to learn from", least=1)
    heldout: int = setting(200, "stories to measure on", least=1)
    world: int = setting(0, "the seed of the language's documents", least=0)

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        train_rows = self._rows(tokenizer, length, 0, self.documents)
        heldout = self._rows(tokenizer, length, HELDOUT, self.heldout)
        summary = summaries({"tinyworld": train_rows, "tinyworld/heldout": heldout})
        floors = {"eval/loss": self.floor(heldout), "eval/bits_per_byte": self.floor_bits_per_byte()}
        summary.append(f"tinyworld: no model gets below {floors['eval/loss']:.4f} nats a token on the held-out stories")
        return Corpus(Mixture([train_rows], [1.0], seed), {"tinyworld": heldout}, summary, floors)

    def default_tokenizer(self) -> Tokenizer:
        """SentencePiece BPE of 512 pieces, trained once and kept in the cache."""
        key = f"{VERSION}:{sorted(TOKENIZER.items())}:{self.world}"
        folder = self.cache_folder / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:24]
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    self.train_tokenizer(folder)
        return open_tokenizer(folder)

    def floor(self, heldout: RowStore) -> float:
        """The generator's own -log p of the held-out documents, nats per loss token."""
        world = TinyWorld(self.world)
        nats = -sum(world.log_probability(text) for text in self._documents(HELDOUT, self.heldout))
        return nats / int(heldout.facts["tokens"])

    def floor_bits_per_byte(self) -> float:
        """The same in bits per byte of text."""
        texts = list(self._documents(HELDOUT, self.heldout))
        return -sum(map(TinyWorld.log_probability, texts)) / math.log(2) / sum(len(t.encode()) for t in texts)

    def _documents(self, first: int, count: int) -> Iterator[str]:
        world = TinyWorld(self.world)
        return (world.document(number) for number in range(first, first + count))

    def _rows(self, tokenizer: Tokenizer, length: int, first: int, count: int) -> RowStore:
        key = ["tinyworld", VERSION, str(self.world), str(first), str(count)]
        documents = self._documents(first, count)
        return prepare_rows(self.cache_folder / "rows", key, lambda: tokenize(documents, tokenizer), tokenizer, length)

    def train_tokenizer(self, folder: Path) -> None:
        """Train the language's own tokenizer into ``folder``, which appears whole or not at all.

        Raises:
            FileExistsError: if it exists.
        """
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; name another folder")
        texts = self._documents(2 * HELDOUT, TOKENIZER["documents"])
        train(texts, folder, vocab_size=TOKENIZER["vocab_size"], specials=CHAT_SPECIALS)
