"""The real llama.cpp (xllamacpp), as a judge of GGUF files: its tokens, its log-probabilities, its chats."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import torch
from torch import Tensor

BETWEEN = -7
FLOAT32 = 0
"""ggml's number of it: keys and values that were rounded would blur what is to be seen of the weights."""


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, file: Path, context: int = 512) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = context, 1, 1
        settings.cache_type_k = settings.cache_type_v = FLOAT32
        settings.verbosity, settings.warmup, settings.fit_params = -1, False, False
        with silence():
            self.server = xllamacpp.Server(settings)

    def tokens(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Ids of each text, without added BOS or EOS."""
        # A request takes texts and ids in turn: with an id that no token has between them it takes all at once.
        mixed: list[str | int] = [each for text in texts for each in (text, BETWEEN)]
        asked = {"content": mixed, "add_special": False, "parse_special": specials}
        answer = httpx.post(f"{self.server.listening_address}/tokenize", json=asked, timeout=60)
        ids: list[list[int]] = [[]]
        for number in answer.json()["tokens"]:
            if number == BETWEEN:
                ids.append([])
            else:
                ids[-1].append(number)
        return ids[:-1]

    def log_probabilities(self, ids: Sequence[int], places: Sequence[int], size: int) -> Tensor:
        """Of all ``size`` tokens after the first n of ``ids``, for each n of ``places``: ``(len(places), size)``."""
        rows = torch.full((len(places), size), torch.nan)
        # A token that ends, or is no whole character, would have no log-probabilities beside it: they are of the raw logits.
        letter = self.tokens(["a"])[0][-1]
        for row, place in zip(rows, places, strict=True):
            asked = {"prompt": list(ids[:place]), "max_tokens": 1, "temperature": 0, "logprobs": size}
            asked["logit_bias"] = [[letter, 1000.0]]
            answer = self.server.handle_completions(asked)
            for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[top["id"]] = top["logprob"]
        return rows

    def chat(self, text: str, longest: int) -> tuple[str, str]:
        """The greedy answer to a message, and why it ended."""
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": longest, "temperature": 0}
        choice = self.server.handle_chat_completions(asked)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What a library writes to the terminal while it loads is dropped."""
    kept_out, kept_err = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept_out, 1)
            os.dup2(kept_err, 2)
            os.close(kept_out)
            os.close(kept_err)
