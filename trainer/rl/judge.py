"""Questions to a language model behind an OpenAI-compatible HTTP endpoint: many at once, with patience, never a guess."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

PATIENT = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which asking again may help."""


class JudgeError(RuntimeError):
    """The endpoint refuses, or cannot be reached at all."""


@dataclass(frozen=True)
class Endpoint:
    """``url``: up to and with ``/v1``. ``key_variable``: the environment variable that holds the key, if one is needed.

    ``timeout``: seconds for an answer. ``attempts``: how often a question is asked at most; the wait between doubles from
    ``backoff`` seconds. ``together``: questions under way at once.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 1.0
    together: int = 16
    tokens: int = 256

    def ask(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[str | None]:
        """The answer to each conversation; None for one that was not answered after all attempts.

        Raises:
            JudgeError: if the endpoint refuses a question (naming its status), or answers none of them.
        """
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.together)
        with (
            httpx.Client(headers=headers, timeout=self.timeout, limits=limits) as client,
            ThreadPoolExecutor(self.together) as pool,
        ):
            found = list(pool.map(lambda messages: self._answer(client, messages), conversations))
        if conversations and not any(answer for answer, _ in found):
            raise JudgeError(f"{self.url} answered none of {len(found)} questions ({found[0][1]}); is it up?")
        return [answer for answer, _ in found]

    def _answer(self, client: httpx.Client, messages: Sequence[dict[str, Any]]) -> tuple[str | None, str]:
        """The answer, else what went wrong last."""
        question = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.tokens}
        wrong = ""
        for attempt in range(self.attempts):
            if attempt:
                # Spread, so that questions that failed together do not come again together.
                time.sleep(self.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            try:
                reply = client.post(f"{self.url.rstrip('/')}/chat/completions", json=question)
            except httpx.TransportError as error:
                wrong = type(error).__name__
                continue
            if reply.status_code in PATIENT:
                wrong = f"status {reply.status_code}"
                continue
            if reply.is_error:
                raise JudgeError(f"{self.url} answers status {reply.status_code}: {reply.text[:200]}")
            return _text(reply), "an answer without text"
        return None, wrong


def _text(reply: httpx.Response) -> str | None:
    try:
        text = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) and text else None


COMPARE = """\
Two answers to the last message of a conversation follow. Judge which helps more: correct, to the point, well written. \
Neither their order nor their length counts. Say why in a sentence, then end with [[A]] or [[B]].

{conversation}

[Answer A]
{first}

[Answer B]
{second}"""


def compare(
    endpoint: Endpoint, prompts: Sequence[Sequence[dict[str, Any]]], pairs: Sequence[tuple[str, str]]
) -> list[int | None]:
    """Which of two answers is better, 0 or 1; None where the judge does not say so in both orders (Zheng et al. 2023,
    arXiv:2306.05685, section 3.4).
    """
    questions = []
    for prompt, (first, second) in zip(prompts, pairs, strict=True):
        said = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
        for a, b in ((first, second), (second, first)):
            questions.append([{"role": "user", "content": COMPARE.format(conversation=said, first=a, second=b)}])
    verdicts = [verdict(answer) for answer in endpoint.ask(questions)]
    return [
        first if first is not None and second == 1 - first else None
        for first, second in zip(verdicts[::2], verdicts[1::2], strict=True)
    ]


def verdict(text: str | None) -> int | None:
    """0 for ``[[A]]``, 1 for ``[[B]]``; None for neither or both."""
    found = [mark in (text or "") for mark in ("[[A]]", "[[B]]")]
    return found.index(True) if sum(found) == 1 else None
