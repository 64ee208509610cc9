"""Talk to an exported model in the terminal.

    onecurve chat runs/sft/export --system "Answer briefly." --temperature 0

The folder's own chat template and end-of-turn tokens are used. /system TEXT, /clear and /quit do what they say.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.cli.parsing import add_sampling_arguments, add_template_arguments, parser_of, template_options
from trainer.generation.pretrained import ChatModel
from trainer.generation.sampling import Sampling


class Conversation:
    """A model, and what has been said so far."""

    def __init__(self, model: ChatModel, sampling: Sampling, seed: int, system: str | None) -> None:
        self.model, self.sampling, self.seed, self.turns = model, sampling, seed, 0
        self.system, self.messages = system, [*_system(system)]

    def answer(self, text: str) -> Iterator[str]:
        """The assistant's answer, piece by piece."""
        self.messages.append({"role": "user", "content": text})
        self.turns += 1
        answer = ""
        for piece in self.model.stream(self.messages, self.sampling, (self.seed, self.turns)):
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def clear(self, system: str | None) -> None:
        """Begin anew."""
        self.system, self.messages = system, [*_system(system)]


def main(arguments: Sequence[str]) -> int:
    """Load the folder and talk."""
    parser = parser_of("chat", __doc__)
    parser.add_argument("model", type=Path, help="an export, or any Hugging Face folder (or hub id) of these families")
    parser.add_argument("--system", help="the system prompt")
    add_template_arguments(parser, date=None)
    add_sampling_arguments(parser, temperature=0.7, tokens=512)
    parser.add_argument("--top-k", type=int, default=0, help="draw from that many of the likeliest tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this share")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw from tokens of this share of the likeliest one")
    a = parser.parse_args(arguments)
    try:
        sampling = Sampling(a.tokens, a.temperature, a.top_k, a.top_p, a.min_p)
    except ValueError as error:
        parser.error(str(error))
    try:
        talk(Conversation(ChatModel.open(a.model, a.template, **template_options(a)), sampling, a.seed, a.system))
    except (KeyboardInterrupt, EOFError):
        print()
    return 0


def talk(conversation: Conversation) -> None:
    """Read, answer, repeat; ends with the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("/system TEXT, /clear, /quit")
    while True:
        text = input("you> " if interactive else "").strip()
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return
        if command in ("/clear", "/system"):
            conversation.clear(rest if command == "/system" else conversation.system)
            continue
        if not text:
            continue
        began, pieces = time.perf_counter(), 0
        for piece in conversation.answer(text):
            print(piece, end="", flush=True)
            pieces += 1
        print()
        if interactive:
            print(f"     ({pieces / (time.perf_counter() - began):.0f} tokens/s)")


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []
