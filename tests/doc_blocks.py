"""What the documentation shows: code blocks, commands and settings, page by page."""

import re
import shlex
from pathlib import Path

from tests.command import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "BENCHMARKS", "CONTRIBUTING", "RELIABILITY")]
PAGES += sorted(DOCS.glob("*.md"))
PROGRAMS = re.compile(r"(python|onecurve|torchrun|srun|make|pip|hf|pytest) |launch/\w+\.sh ")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.S | re.M)


def named_blocks(page: Path, language: str) -> dict[str, str]:
    """Blocks whose first line is a comment with a file's name, by that name."""
    named = [(re.match(r"# (\S+\.(?:py|yaml|jsonl))$", block, re.M), block) for block in blocks(page, language)]
    return {match[1]: block for match, block in named if match}


def inline(page: Path) -> list[str]:
    """Code within sentences; of a table with a column for this project, that column alone."""
    pieces, column = [], None
    for line in re.sub(r"^```.*?^```", "", text(page), flags=re.S | re.M).splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []
        if not cells:
            column = None
        elif column is None:
            heads = [n for n, cell in enumerate(cells) if "Onecurve" in cell]
            column = heads[0] if heads else -1
        shown = cells[column] if cells and column is not None and 0 <= column < len(cells) else line
        pieces += [piece.replace("\\|", "|") for piece in re.findall(r"`([^`]+)`", shown)]
    return pieces


def commands(page: Path) -> list[list[str]]:
    """Every command of a page in words: lines of bash blocks, and commands within sentences."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [piece for piece in inline(page) if PROGRAMS.match(piece)]
    found = []
    for line in lines:
        line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)  # an option that may be left out
        line = re.sub(r"\s#.*", "", re.sub(r"\w+=\$\((.*)\)", r"\1", line))
        for part in re.split("&&|;", line):
            words = shlex.split(part)
            if words:
                found.append(words)
    return found
