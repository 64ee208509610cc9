"""``onecurve export --format``: a finished model in other formats, and what each cost."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.run_folder import RECORD
from trainer.cli.recorded import compose_recorded, record_of
from trainer.config import ConfigError, InputError
from trainer.data.chats import ChatData
from trainer.data.corpus import Corpus, TextData
from trainer.data.hub import local_folder
from trainer.data.preferences import PreferenceData
from trainer.data.sources import DataSource
from trainer.data.tokenizer import open_tokenizer
from trainer.export.cost import Heldout
from trainer.export.export_rows import CALIBRATION_LENGTH, calibration_rows, heldout_of
from trainer.export.format_folder import write_formats
from trainer.export.formats import FORMATS, Calibration, folder_problems, name_problems
from trainer.export.hugging_face import Export
from trainer.models.header import read_shape
from trainer.parallel.environment import place

ROW = 1024
"""Tokens of a row of ``--data``."""


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the verb write other formats."""
    parser.add_argument("--format", metavar="NAME[,NAME]", help=f"one or several of {', '.join(FORMATS)}")
    parser.add_argument("--calibration", metavar="FILE", help="rows that int4 is calibrated on; default: the run's own")
    parser.add_argument("--data", metavar="FILE", help="held-out rows to measure on; default: the run's own")
    parser.add_argument("--cost-tokens", type=int, help="held-out tokens to measure on; default: the run's, else 16384")
    parser.add_argument("--answer-tokens", type=int, default=64, help="longest answer where right answers are known")


@dataclass(frozen=True)
class Subject:
    """What is written: a Hugging Face folder, and the run that it is the export of, if it is one's."""

    source: Path
    run_dir: Path | None

    @classmethod
    def of(cls, named: Path) -> Subject:
        """The model that a path, or a hub id, names: a run's is its ``export/``.

        Raises:
            InputError: if a run has none yet.
        """
        if (named / RECORD).is_file():
            if not (named / "export").is_dir():
                raise InputError(f"{named} has no export/ yet; write it first: onecurve export {named}")
            return cls(named / "export", named)
        source = Path(local_folder(named))
        return cls(source, source.parent if (source.parent / RECORD).is_file() else None)

    def outs(self, out: Path | None, names: list[str]) -> dict[str, Path]:
        """The folder of each format.

        Raises:
            InputError: if nobody says where, and the model is no run's.
        """
        if out is not None:
            return {name: out / name for name in names}
        if self.run_dir is None:
            raise InputError(
                f"{self.source} is no run's; say where to write: onecurve export {self.source} OUT --format ..."
            )
        return {name: self.run_dir / f"export-{name}" for name in names}


def export_formats(a: argparse.Namespace) -> int:
    """Write, measure, and show both; nothing is written where anything is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # how far a calibration is
    names, subject = a.format.split(","), Subject.of(a.run_dir)
    outs = subject.outs(a.out, names)
    if problems := list(_problems(names, subject, outs, a)):
        raise ConfigError(problems, "This export")
    calibration, heldout = rows_of(subject, names, a)
    write_formats(subject.source, outs, calibration, heldout, _show)
    return 0


def _problems(names: list[str], subject: Subject, outs: dict[str, Path], a: argparse.Namespace) -> Iterator[str]:
    if place().size > 1:
        yield "--format works on one rank; start it without torchrun"
    yield from name_problems(names, "--format")
    yield from folder_problems(names, subject.source, "--format")
    yield from (f"{out} exists already; name another folder" for out in outs.values() if out.exists())
    calibrated = [name for name in names if name in FORMATS and FORMATS[name].calibrated]
    if calibrated and a.calibration is None and subject.run_dir is None:
        yield f"{', '.join(calibrated)} is calibrated on rows like those it will see; give --calibration FILE.jsonl"
    for option, file in (("--calibration", a.calibration), ("--data", a.data)):
        if file is not None and (problem := DataSource(file).problem()):
            yield f"{option}: {problem}"


def rows_of(subject: Subject, names: list[str], a: argparse.Namespace) -> tuple[Calibration, Heldout | None]:
    """Rows to calibrate on, where a format needs some, and rows to measure on."""
    calibrated = any(FORMATS[name].calibrated for name in names)
    own, tokens = None, a.cost_tokens
    if subject.run_dir is not None and ((calibrated and a.calibration is None) or a.data is None):
        cfg = compose_recorded(record_of(subject.run_dir)["command"], subject.run_dir)
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        own, tokens = cfg.open_corpus(tokenizer), cfg.export.cost_tokens if tokens is None else tokens
    calibration: Calibration = []
    if calibrated:
        data = own if a.calibration is None else corpus_of(a.calibration, subject.source, CALIBRATION_LENGTH)
        calibration = calibration_rows(data.train) if data is not None else []
    measured = own if a.data is None else corpus_of(a.data, subject.source, ROW)
    default = Export().cost_tokens if tokens is None else tokens
    return calibration, None if measured is None else heldout_of(measured, default, a.answer_tokens)


def corpus_of(file: str, source: Path, length: int) -> Corpus:
    """A file's rows as a stage reads them that trains such a model: preferences, documents, or conversations.

    Raises:
        InputError: if it has no rows of that kind.
    """
    shape, tokenizer = read_shape(source), open_tokenizer(source)
    first = next((row for _, row in DataSource(file).rows()), {})
    kind = PreferenceData if shape.scores else TextData if "text" in first else ChatData
    data = kind(train=[file], eval=[file])
    corpus = data.open(tokenizer, min(length, shape.max_position_embeddings), 0)
    _show(list(dict.fromkeys(line for part in corpus.heldout.values() for line in part.summary(file))))
    return corpus


def _show(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)
