"""What sampling gives: a completion as tokens, and as a response to its prompt that can be scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.data.corpus import Prompt


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    ids: the tokens that were sampled, a stop token included
    logprobs: of each under softmax(logits / temperature) before any filter, float32; at temperature 0 the plain softmax
    ended: by a stop token rather than by the limit
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool


@dataclass(eq=False)
class RunningSequence:
    """A prompt and what has followed it so far.

    number: the prompt's place among all that are decoded
    prompt: its ids
    bits: seed its random draws
    ids, logprobs: as in `Completion`
    ended: by a stop token
    done: ended, or as long as it may become
    """

    number: int
    prompt: tuple[int, ...]
    bits: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    done: bool = False

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the last one, which passes through next."""
        return len(self.prompt) + len(self.ids) - 1


class Response(NamedTuple):
    """A completion to score.

    prompt: what it answers
    ids: its tokens as they were sampled
    text: its text without special tokens
    number: the number of the prompt's row in the data, -1 where there is none
    """

    prompt: Prompt
    ids: list[int]
    text: str
    number: int = -1
