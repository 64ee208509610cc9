"""The documentation is true: its configuration page, its commands, its links and its worked example."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, TINY, Command, metrics
from trainer.compose import compose
from trainer.config import ConfigError

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLE = (DOCS / "algorithm.md").read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands() -> list[tuple[str, str]]:
    """Every command line of every page."""
    return [
        (page.name, line) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line
    ]


def load(script: str):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_dataclasses_say():
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == load("generate_configuration").text(), (
        "run python scripts/generate_configuration.py"
    )


def test_the_configuration_page_has_every_setting_of_a_composed_run():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for setting in ("batch.micro", "pipeline.beta", "pipeline.rollout.tokens", "adapter.rank", "tracking.wandb.mode"):
        assert f"| `{setting}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    linked = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in linked if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_listed(page):
    assert page.name == "README.md" or f"({page.name})" in (DOCS / "README.md").read_text(encoding="utf-8")


def sources() -> list[Path]:
    """Every text file of the repository that a reader may start from."""
    folders = ("trainer", "tests", "docs", "configs", "scripts", "launch")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md", ".yaml", ".sh")]
    return [*files, *ROOT.glob("*.md")]


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_reference_to_a_section_leads_to_its_heading():
    references = [
        (file, page, anchor)
        for file in sources()
        for page, anchor in re.findall(r"\b([\w/-]+\.md)#([\w-]+)", file.read_text(encoding="utf-8"))
    ]
    folder = {file: file.parent if file.suffix == ".md" else ROOT for file, _, _ in references}
    broken = [
        f"{file.relative_to(ROOT)}: {page}#{anchor}"
        for file, page, anchor in references
        if not (folder[file] / page).is_file() or anchor not in headings(folder[file] / page)
    ]
    assert broken == []
    assert len(references) > 20, "the docstrings of losses and pipelines point to docs/algorithms.md"


def test_links_inside_a_page_lead_to_its_headings():
    own = [
        (page, anchor) for page in PAGES for anchor in re.findall(r"\]\(#([\w-]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert [(page.name, anchor) for page, anchor in own if anchor not in headings(page)] == []


def test_no_reference_leads_out_of_the_repository():
    """Codes such as G5 in brackets belonged to a list of invariants that was never published."""
    unpublished = re.compile(r"ALGORITHMS[,.]|\([PDSGR][1-9]\)")
    assert [
        f"{file.relative_to(ROOT)}" for file in sources() if unpublished.search(file.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_every_command_names_things_that_exist(page, line, tmp_path, monkeypatch):
    """Scripts are there, and every override of a run is a setting that exists, with a value that it takes."""
    words = shlex.split(line.replace("$(", "").replace(")", ""), comments=True)
    for word in words:
        if word.startswith(("scripts/", "launch/")):
            assert (ROOT / word).is_file(), word
    if "trainer" not in words and not words[0].startswith("launch/") and "scripts/preview.py" not in words:
        return
    if "trainer" in words:
        overrides = words[words.index("trainer") + 1 :]
    else:
        overrides = words[words.index("--") + 1 :] if "--" in words else words[words.index("scripts/preview.py") + 1 :]
    if "--config-dir" in overrides:  # the worked example, which is run below
        return
    if "--multirun" in overrides or "..." in overrides:  # several points, or what a reader fills in
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text(blocks(DOCS / "ppo.md", "python")[0])
    sys.modules.pop("my_rewards", None)
    for name in re.findall(r"[\w-]+\.jsonl", line):
        (tmp_path / name).write_text(json.dumps({"text": "Ada."}) + "\n")
    try:
        compose([word for word in overrides if not word.startswith("--")], name="docs")
    except ConfigError as error:
        wrong = [
            p for p in error.problems if not re.search(r"DIR|runs/|does not exist|no such|no folder|multiple of", p)
        ]
        assert wrong == []


@pytest.mark.slow
def test_the_worked_example_runs_as_it_stands(tmp_path):
    code, yaml = blocks(DOCS / "algorithm.md", "python")[0], blocks(DOCS / "algorithm.md", "yaml")[0]
    (tmp_path / "repetition.py").write_text(code)
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "unlikelihood.yaml").write_text(yaml)
    command = shlex.split(blocks(DOCS / "algorithm.md", "bash")[0])
    Command(tmp_path, *command[3:], *TINY, "run_dir=r", "steps=4", "pipeline.strength=0.5").finish()
    lines = [line for line in metrics(tmp_path / "r") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["unlikelihood"] > 0 for line in lines)
    assert "unlikelihood" in (tmp_path / "r" / "report.html").read_text()
    assert "strength" in (tmp_path / "r" / "config.yaml").read_text()


def test_the_worked_example_is_one_file_and_one_line_of_yaml():
    assert EXAMPLE.count("```python") == 1
    assert len(blocks(DOCS / "algorithm.md", "yaml")[0].splitlines()) == 1
