"""The command line, ``onecurve VERB``: a verb is a module, hyphens as underscores, with ``main(arguments)``."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import stopping

if TYPE_CHECKING:
    from trainer.config import ConfigError

VERBS = {
    "train": "train a model: pretraining, SFT, reward modelling, DPO, KTO, PPO, GRPO",
    "preview": "inspect the training targets of a run: what its first rows teach",
    "prepare": "tokenise and pack the data of a run before it",
    "split": "hold out rows that share no near-equal prompt with those to learn from",
    "tokenize": "train a SentencePiece tokenizer",
    "estimate": "predict memory and time of a run on other machines",
    "chat": "talk to a model in the terminal",
    "generate": "complete prompts, a JSON line each",
    "score": "score answers with a reward model",
    "compare": "answer the same prompts with several models and score the answers",
    "evaluate": "measure a model on held-out data without training it",
    "convert": "turn a GGUF file into a Hugging Face folder",
    "export": "a run's newest checkpoint as a Hugging Face folder; a model in other formats",
    "label": "make preference pairs: a model answers twice, a judge chooses",
    "report": "write report.html of a run, or one that compares runs",
    "recipe": "carry out the stages of a model's life, one after the other",
    "submit": "submit a run to Slurm",
    "preflight": "check the nodes of a job before it",
    "check-gpu": "check that everything is right and fast on this machine's GPU",
    "verify": "verify the checkpoints of a run",
}
"""Every verb with what it does, in the order in which they are listed."""
COLLECTIVE = ("train", "evaluate", "export", "preflight")
"""Verbs that several ranks carry out together."""
REFUSED = "ONECURVE_REFUSED"
"""Names a file that is made when a command is refused: launchers that replace exit codes hide the 2."""


def main(arguments: Sequence[str] | None = None, default: str | None = None) -> int:
    """Carry out a command line; ``default`` is the verb where the first word is none.

    Returns:
        The exit code: 0 done, 1 failed, 2 refused because the input cannot work, 75 stopped early and saved: run it again.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (default is None and words[0] in ("-h", "--help")):
        print(overview())
        return 0
    if words[0] in VERBS:
        verb = words.pop(0)
    elif default is not None:
        verb = default
    else:
        print(f"error: {unknown(words)}", file=sys.stderr)
        return 2
    if verb == "train":
        stopping.listen()  # before torch is imported, which takes seconds
    command = importlib.import_module(f"trainer.cli.{verb.replace('-', '_')}")
    from trainer.config import InputError, RunError
    from trainer.disk import disk_error

    try:
        code: int = command.main(words)
    except (InputError, RunError) as error:
        code = ended_by(error)
    except OSError as error:
        if (known := disk_error(error)) is None:
            raise
        code = ended_by(known)
    if verb in COLLECTIVE:
        end_ranks(code)
    return code


def ended_by(error: Exception) -> int:
    """Say what ended a command; gives the exit code: 2 for what the user has to mend, 1 for what may pass by itself."""
    from trainer.config import ConfigError, InputError

    print(refusal(error) if isinstance(error, ConfigError) else f"error: {error}", file=sys.stderr)
    if not isinstance(error, InputError):
        return 1
    if marker := os.environ.get(REFUSED):
        with suppress(OSError):
            Path(marker).touch()
    return 2


def end_ranks(code: int) -> None:
    """End a process of several ranks at once; return where there is one rank.

    All files are closed by now. A gloo thread that lets go of a Python object while the interpreter shuts down aborts the
    process (seen in one of some fifty two-rank ZeRO-3 runs), and a launcher takes that for a failure of the run.
    """
    from trainer.parallel.environment import place

    if place().size > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def overview() -> str:
    """The verbs, a line each."""
    lines = "\n".join(f"  {verb:<11} {meaning}" for verb, meaning in VERBS.items())
    first = "onecurve train experiment=tinyworld    a first run: minutes on a CPU, no data needed"
    return (
        f"usage: onecurve VERB ...\n\n{lines}\n\n'onecurve VERB --help' explains a verb and shows an example.\n{first}"
    )


def unknown(words: Sequence[str]) -> str:
    """What is wrong with a command line whose first word is no verb."""
    if "=" in words[0] or words[0].startswith("-"):
        return f"{words[0]} comes before a verb; did you mean 'onecurve train {' '.join(words)}'?"
    near = difflib.get_close_matches(words[0], VERBS, n=1)
    return f"{words[0]} is not a verb; " + (f"did you mean '{near[0]}'?" if near else f"use {', '.join(VERBS)}")


def refusal(error: ConfigError) -> str:
    """All problems of a configuration, one a line."""
    count = len(error.problems)
    head = f"{error.subject} cannot work" + (":" if count == 1 else f", for {count} reasons:")
    return "\n".join([head, *(f"  - {problem}" for problem in error.problems)])
