"""``report.html``: what a run, several runs or a whole lifecycle say, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.disk import write_text
from trainer.report.catalogue import SECTIONS
from trainer.report.charts import by_section, figures
from trainer.report.comparison import comparison, title_of
from trainer.report.histograms import histograms
from trainer.report.html import duration, markup, number
from trainer.report.lifecycle import RECORD, lifecycle
from trainer.report.page import opening, page, plots
from trainer.report.recording import Recording, read
from trainer.report.sweeps import labelled
from trainer.report.tables import ancestry, changed, errors, formats, made, samples, settings, statistics, time_split
from trainer.report.verdict import headline, verdict

FILE = "report.html"


def write(folder: Path, ended: str | None = None, stopped: str | None = None) -> Path:
    """Write the report of a run or of a lifecycle into its folder, and give its path.

    ``ended``: why a run failed; ``stopped``: what it was stopped and saved for.
    """
    text = lifecycle(folder) if (folder / RECORD).is_file() else of_run(read(folder, ended, stopped))
    return _replace(folder / FILE, text)


def write_comparison(file: Path, folders: Sequence[Path]) -> Path:
    """Write a report that compares runs."""
    return _replace(file, comparison(labelled([read(folder) for folder in folders]), title_of(folders)))


def runs_in(folder: Path) -> Iterator[Path]:
    """The run folders that a path means: itself, or those inside, as of a sweep."""
    if (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file():
        yield folder
        return
    if folder.is_dir():
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and inside.name not in ("checkpoints", "export"):
                yield from runs_in(inside)


def of_run(run: Recording) -> str:
    """The page of one run."""
    drawn, distributions = figures(run), histograms(run)
    groups = by_section(drawn)
    parts = {}
    for section, group in groups.items():
        parts[SECTIONS[section]] = plots(group, more=distributions if section == "rewards" else ())
    parts |= {
        "Distributions": plots([], more=() if "rewards" in groups else distributions),
        "Time": time_split(run),
        "Samples": samples(run),
        "Largest errors": errors(run),
        "Formats": formats(run),
        "Data": statistics(run),
        "Configuration": markup(changed(run), settings(run)),
        "Ancestry": markup(ancestry(run), made(run)),
    }
    return page(run.name, opening(run.name, headline(drawn), verdict(run, drawn), _tiles(run)), parts)


def _tiles(run: Recording) -> dict[str, str]:
    tiles = {"Steps": number(run.last)} if run.last else {}
    if (tokens := run.latest("tokens")) is not None:
        tiles["Tokens"] = number(tokens)
    # The first of these that the run has.
    for name, label in (("objective/score", "Score"), ("eval/loss", "Held-out loss"), ("loss", "Training loss")):
        if (value := run.latest(name)) is not None:
            tiles[label] = number(value)
            break
    if run.seconds:
        tiles["Time"] = duration(sum(run.seconds.values()))
    if (memory := run.latest("memory_gb")) is not None:
        tiles["Memory"] = f"{memory:.2f} GB"
    return tiles


def _replace(file: Path, text: str) -> Path:
    """Replace a file at once: whoever has it open sees the old one or the new one."""
    write_text(file, text)
    return file
