"""The documentation is true: its commands are parsed and composed, its code runs, its settings, links and pages exist."""

import argparse
import importlib
import importlib.util
import json
import math
import re
import runpy
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.chats import write_jsonl
from tests.command import ROOT, TINY
from tests.doc_blocks import DOCS, PAGES, blocks, commands, inline, named_blocks, text
from tests.registries import registries, restored
from trainer.cli import VERBS
from trainer.compose import compose
from trainer.config import ConfigError, offer_schemas
from trainer.parallel.environment import imagined
from trainer.run import run

README = ROOT / "README.md"
ROWS = [
    {
        "text": f"{word}.", "prompt": f"Say {word}.", "completion": word, "chosen": word, "rejected": "no", "ideal": word,
        "dialogue": [f"Say {word}.", word],
    }
    for word in ("red", "green", "blue", "black")
]  # fmt: skip


def load(script: str):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- stand-ins: what a reader has, a few thousand weights small


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a language model with a chat template, and of a reward model made from it."""
    folder = tmp_path_factory.mktemp("models")
    quiet = ["evaluation.first=false", "evaluation.every=0", *TINY[-3:], f"data.cache={folder}/cache"]
    run(compose([f"run_dir={folder}/lm", *TINY, *quiet, "steps=1", "schedule.warmup=0"]))
    settings = folder / "lm" / "export" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    pairs = write_jsonl(folder / "pairs.jsonl", ROWS)
    run(
        compose([
            "pipeline=reward", "data=preference", f"model.path={folder}/lm/export", f"data.train=[{pairs}]", *quiet,
            f"run_dir={folder}/reward", "batch.size=4", "batch.micro=4", "batch.length=64", "steps=1", "schedule.warmup=0",
        ])
    )  # fmt: skip
    return folder


@pytest.fixture
def desk(models, clean_registries, tmp_path, monkeypatch):
    """A working folder in which every file and folder that a command names has a stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for page in PAGES:
        for name, block in {**named_blocks(page, "python"), **named_blocks(page, "yaml")}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(block)
    importlib.invalidate_caches()

    def place(words: list[str]) -> None:
        for path in {Path(p) for word in words for p in re.findall(r"[\w.*/-]+", word.rpartition("=")[2])}:
            target = tmp_path / path
            if ".jsonl" in path.name and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(target, ROWS)
            elif (path.parts[:1] in (("runs",), ("models",)) or path.name == "DIR") and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(models / ("reward" if "reward" in str(path) else "lm") / "export", target)

    return place


# ---- commands


class ParsedError(Exception):
    """Raised in place of what a program would do once its arguments are parsed."""


def accepts(program: Callable[[], object], monkeypatch) -> None:
    """A program's parser takes its arguments; it is stopped there, or where it has printed its help."""

    def stopping(parse):
        def stopped(self, *args, **kwargs):
            values = parse(self, *args, **kwargs)
            if sys._getframe(1).f_code.co_filename != argparse.__file__:
                raise ParsedError
            return values

        return stopped

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    with pytest.raises((ParsedError, SystemExit)) as end:
        program()
    assert end.type is ParsedError or not end.value.code, "its arguments are refused"


def composes(overrides: list[str]) -> None:
    """The overrides of a run are settings that exist, with values that they take. Of a sweep, the first point."""
    words = [word for word in overrides if word != "..."]
    folders = [words.pop(at + 1) for at, word in enumerate(words) if word == "--config-dir"]
    sweep = "--multirun" in words
    words = [word for word in words if not word.startswith("--") and not (sweep and word.startswith("hydra"))]
    if sweep:
        # Of a list of values the first one, of an interval its lower end.
        words = [re.sub(r"^([^=]+=)(?:.*interval\()?([^,()]+).*$", r"\1\2", word) for word in words]
    unfinished = "..." in overrides
    try:
        compose(words, config_dirs=folders, name="docs")
    except ConfigError as error:
        # A command with an ellipsis leaves to the reader what its choices require.
        wrong = [p for p in error.problems if not (unfinished and ("required" in p or "multiple of" in p))]
        assert wrong == []


def runs_program(path: str, words: list[str], monkeypatch) -> None:
    """A script of the checkout exists, and accepts the arguments."""
    file = ROOT / path
    assert file.is_file(), path
    if file.suffix == ".py" and "ArgumentParser" in file.read_text():
        monkeypatch.setattr(sys, "argv", [path, *words])
        monkeypatch.syspath_prepend(file.parent)
        accepts(lambda: runpy.run_path(str(file), run_name="__main__"), monkeypatch)


def verb(name: str, words: list[str], monkeypatch) -> None:
    """The verb exists, accepts its options, and its overrides compose."""
    assert name in VERBS, f"onecurve has no verb {name}"
    if name == "train":
        composes(words)
        return
    if not words:  # a sentence names the verb
        return
    if "--" in words:
        at = words.index("--")
        words, overrides = words[:at], words[at + 1 :]
        composes(overrides)
    module = importlib.import_module(f"trainer.cli.{name.replace('-', '_')}")
    if re.search("ArgumentParser|parser_of", Path(module.__file__).read_text()):
        accepts(lambda: module.main([word for word in words if word != "..."]), monkeypatch)
    if name in ("preview", "prepare", "estimate", "evaluate"):
        # Paths of data and tokenizer may be left out of an estimate; a plan's nodes are no settings of a run.
        planned = ("nodes=", "gpus_per_node=") if "--plan" in words else ()
        settings = [word for word in words if "=" in word and not word.startswith(("-", *planned))]
        composes(settings + ["..."] * (name == "estimate"))


def check(words: list[str], monkeypatch) -> None:
    """One command of the documentation: each program that it may start has its own rule."""
    program, rest = words[0], words[1:]
    if program in ("torchrun", "srun"):
        start = next(
            (n for n, word in enumerate(rest) if word == "-m" or word.endswith(".py") or word == "python"), None
        )
        assert start is not None, f"{' '.join(words)} starts nothing"
        started = rest[start:] if rest[start] == "python" else ["python", *rest[start:]]
        ranks = re.search(r"--nproc-per-node[ =](\d+)", " ".join(rest[:start]))
        # On as many ranks as it starts: a batch must be a multiple of them.
        with imagined(int(ranks[1])) if ranks else nullcontext():
            return check(started, monkeypatch)
    if program.startswith("launch/") and program.endswith(".sh"):
        assert (ROOT / program).is_file()
        return composes(rest[rest.index("--") + 1 :])
    if program == "onecurve":
        return verb(rest[0], rest[1:], monkeypatch) if rest and rest[0] != "VERB" else None
    if program == "python" and rest[:2] == ["-m", "trainer"]:
        name = rest[2] if len(rest) > 2 and rest[2] in VERBS else "train"
        return verb(name, rest[3:] if name in rest[2:3] else rest[2:], monkeypatch)
    if program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None, rest[1]
        return None
    if program == "python":
        return runs_program(rest[0], rest[1:], monkeypatch)
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in rest)
        return None
    if program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
        return None
    assert program in ("hf", "git", "cd", "pytest", "sbatch", "scancel", "wandb"), f"no rule checks {' '.join(words)}"
    return None


COMMANDS = [(page, words) for page in PAGES if page.name != "configuration.md" for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.stem}-{' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_parses_and_composes(page, words, desk, monkeypatch):
    desk(words)
    check(words, monkeypatch)


FALSE = """
python -m trainer data.workers=4
onecurve fly
python scripts/none.py
python scripts/benchmarks/plan.py --fast
launch/local.sh -n 2 -- strategy=sharded
torchrun --nproc-per-node 2 -m trainer steps=many
make coffee
pip install '.[nothing]'
unknown thing
"""


@pytest.mark.parametrize("command", FALSE.strip().splitlines())
def test_a_false_command_is_noticed(command, desk, monkeypatch):
    with pytest.raises((AssertionError, SystemExit)):
        check(shlex.split(command), monkeypatch)


# ---- settings within sentences


def settings() -> dict[str, str]:
    """Every setting of the configuration page with its range of values."""
    rows = re.findall(r"^\| `([\w.]+)` \| .*? \| (.*?) \| ", text(DOCS / "configuration.md"), re.M)
    return {name.replace(".NAME.", ".*."): values for name, values in rows}


def choices() -> dict[str, set[str]]:
    """Groups, and what can be chosen for each."""
    page = text(DOCS / "configuration.md")
    found = {
        folder.name: {file.stem for file in folder.glob("*.yaml")}
        for folder in (ROOT / "configs").iterdir()
        if folder.is_dir()
    }
    for group, name in re.findall(r"^## `(\w+)=(\w+)`", page, re.M):
        found.setdefault(group, set()).add(name)
    return found


def wrong_setting(piece: str, known: dict[str, str], groups: dict[str, set[str]]) -> bool:
    """Whether code within a sentence names a setting that does not exist, or a choice that a group does not have."""
    name, equals, value = piece.partition("=")
    if not re.fullmatch(r"[a-z][\w]*(\.[a-z]\w*)*", name):
        return False
    root = name.partition(".")[0]
    if name.endswith((".json", ".jsonl", ".model", ".yaml", ".py", ".md", ".html")):
        return False
    if equals and name in groups:
        return not all(
            choice in groups[name] or not choice.islower()
            for choice in re.split(r"[|,]", value)
            if choice.isidentifier()
        )
    if "." not in name or root not in {key.partition(".")[0] for key in known} | set(groups):
        return False
    anywhere = re.sub(r"(pipeline\.reward\.)\w+", r"\1*", name)
    return not any(key in (name, anywhere) or key.startswith(f"{anywhere}.") for key in known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_within_sentences_exist(page):
    known, groups = settings(), choices()
    assert [piece for text_ in inline(page) for piece in text_.split() if wrong_setting(piece, known, groups)] == []


def test_a_setting_that_does_not_exist_is_noticed():
    known, groups = settings(), choices()
    wrong = ["data.workers", "pipeline.betta=0.1", "strategy=zero4", "pipeline.reward.main.paths=DIR"]
    right = [
        "data.columns={text: body}",
        "pipeline.beta",
        "strategy=zero1|zero2",
        "pipeline.reward.main.path=DIR",
        "model.path",
    ]
    assert [piece for piece in wrong + right if wrong_setting(piece, known, groups)] == wrong


# ---- code


PYTHON = [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), PYTHON, ids=[f"{page.stem}-{number}" for page, number in PYTHON])
def test_a_python_block_runs_as_it_stands(page, number, desk, monkeypatch):
    block = blocks(page, "python")[number]
    desk([block])
    module = types.ModuleType(f"{page.stem}_{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, f"{page.name}[{number}]", "exec"), vars(module))


SMALL_GROUPS = [
    "pipeline.samples_per_prompt=2",
    "pipeline.rollout.size=4",
    "pipeline.rollout.tokens=8",
    "pipeline.rollout.max_resample=0",
]
SMALL = [
    "precision=fp32", "epochs=null", "steps=2", "batch.size=4", "batch.micro=4", "batch.length=64", "run_dir=run",
    "schedule.warmup=0", "data.cache=cache", "evaluation.every=0", "evaluation.first=false", *TINY[-3:],
]  # fmt: skip
RECIPES = [words for words in commands(DOCS / "extending.md") if words[:2] == ["onecurve", "train"]]


@pytest.mark.parametrize(
    "words", RECIPES, ids=[re.findall(r"imports=\S+|function=\S+", " ".join(w))[0] for w in RECIPES]
)
def test_a_recipe_trains(words, desk):
    """Two steps with the page's own file, settings and a small model."""
    desk(words)
    small = [*SMALL, *SMALL_GROUPS] if "experiment=grpo" in words else SMALL
    small = small if any("model.path" in word for word in words) else [*TINY, *small]
    values = run(compose([*words[2:], *small]))
    assert math.isfinite(values["loss"])


def test_a_recipe_leaves_no_registration_behind(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = [(table, table.copy()) for table in registries()]
    with restored(tmp_path):
        for number, block in enumerate(blocks(DOCS / "extending.md", "python")):
            (tmp_path / f"recipe_{number}.py").write_text(block)
            importlib.invalidate_caches()
            importlib.import_module(f"recipe_{number}")
        offer_schemas([])
        assert len([table for table, entries in before if table != entries]) >= 6
    assert [table for table, entries in before if table != entries] == []
    assert [name for name in sys.modules if name.startswith("recipe_")] == []


def test_a_recipe_is_one_file():
    assert all(len(re.findall(r"imports=\[[\w,]+\]|function=", " ".join(words))) == 1 for words in RECIPES)


# ---- pages


def test_the_readme_is_read_in_a_few_minutes():
    assert len(text(README).split()) <= 900


def test_the_configuration_page_is_what_the_dataclasses_say():
    assert text(DOCS / "configuration.md") == load("generate_configuration").text(), (
        "run python scripts/generate_configuration.py"
    )


def test_the_configuration_page_has_every_setting_of_a_composed_run():
    known = settings()
    for setting in ("batch.micro", "pipeline.beta", "pipeline.rollout.tokens", "adapter.rank", "tracking.wandb.mode"):
        assert setting in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    linked = [
        link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text(page)) if not link.startswith("http")
    ]
    assert [link for link in linked if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_listed(page):
    assert page.name == "README.md" or f"({page.name})" in text(DOCS / "README.md")


def sources() -> list[Path]:
    """Every text file of the repository that a reader may start from."""
    folders = ("trainer", "tests", "docs", "configs", "scripts", "launch")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md", ".yaml", ".sh")]
    return [*files, *ROOT.glob("*.md")]


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_reference_to_a_section_leads_to_its_heading():
    references = [
        (file, page, anchor)
        for file in sources()
        for page, anchor in re.findall(r"\b([\w/-]+\.md)#([\w-]+)", text(file))
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
    own = [(page, anchor) for page in PAGES for anchor in re.findall(r"\]\(#([\w-]+)\)", text(page))]
    assert [(page.name, anchor) for page, anchor in own if anchor not in headings(page)] == []


def test_no_reference_leads_out_of_the_repository():
    """Codes such as G5 in brackets belonged to a list of invariants that was never published."""
    unpublished = re.compile(r"ALGORITHMS[,.]|\([PDSGR][1-9]\)")
    assert [f"{file.relative_to(ROOT)}" for file in sources() if unpublished.search(text(file))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_named_in_sentences_exist(page):
    """Of the checkout: what begins with one of its folders."""
    pattern = re.compile(r"(?:trainer|configs|tests|scripts|docs|launch|examples)/[\w./-]*")
    named = [piece for piece in inline(page) if pattern.fullmatch(piece)]
    assert [piece for piece in named if not (ROOT / piece).exists()] == []
