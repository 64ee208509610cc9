"""Turn the newest checkpoint of a run that has not come to its end into a Hugging Face folder; adapters are merged.

    onecurve export runs/sft
    onecurve export runs/sft models/sft-step-200
    torchrun --nproc-per-node 8 -m trainer export runs/sft_7b        (what takes as many ranks as training)

The run is composed again from the command in its config.yaml, so start this in the folder in which the run was started.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.checkpoint import Checkpointer
from trainer.checkpoint.record import plain, read_record, texts_of
from trainer.checkpoint.run_folder import PRIVATE, RECORD
from trainer.cli.parsing import parser_of
from trainer.cli.train import split_config_dirs
from trainer.compose import compose
from trainer.config import InputError
from trainer.export.lineage import ancestry
from trainer.export.peft import merged_weights
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.run import Run


def main(arguments: Sequence[str]) -> int:
    """Write the folder."""
    parser = parser_of("export", __doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of the run")
    parser.add_argument("out", type=Path, nargs="?", help="the folder to write; default: export/ in the run's folder")
    a = parser.parse_args(arguments)
    facts = record_of(a.run_dir)
    out = a.out or a.run_dir / "export"
    if out.exists():
        raise InputError(f"{out} exists already; name another folder")
    step = export(compose_recorded(facts["command"], a.run_dir), a.run_dir, out, facts)
    print(f"{out}: the model after step {step}")
    return 0


def record_of(run_dir: Path) -> dict[str, Any]:
    """How a run was made, by its record.

    Raises:
        InputError: if the folder is no run's.
    """
    if not (run_dir / RECORD).is_file():
        raise InputError(f"{run_dir} is not a run directory (it has no {RECORD}); give the run_dir of a run")
    facts: dict[str, Any] = read_record(run_dir / RECORD)["facts"]
    return {key: value for key, value in facts.items() if key not in PRIVATE}


def restored_step(cfg: Run, run_dir: Path, engine: Engine) -> int:
    """Restore the newest checkpoint that verifies; gives its step. Collective.

    Raises:
        InputError: if there is none.
    """
    step = Checkpointer(cfg.checkpoint, run_dir / "checkpoints", engine, {}, {}).restore()
    if step == 0:
        raise InputError(f"{run_dir} holds no checkpoint that can be read; let the run save one (checkpoint.every)")
    return step


def compose_recorded(command: str, run_dir: Path, more: Sequence[str] = ()) -> Run:
    """The configuration that a run's command line described, with further overrides."""
    words = shlex.split(command)[1:]
    config_dirs, overrides = split_config_dirs(words[1:] if words[:1] == ["train"] else words)
    return compose([*overrides, f"run_dir={run_dir}", *more], config_dirs=config_dirs)


def export(cfg: Run, run_dir: Path, out: Path, facts: dict[str, Any]) -> int:
    """Restore the newest checkpoint that verifies and write its model; gives its step. Collective."""
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    corpus, load = cfg.open_corpus(tokenizer), cfg.loader(tokenizer)
    with distributed.session() as world, ExitStack() as locks:
        if world.is_main:
            try:
                locks.enter_context(FileLock(run_dir / ".lock", timeout=0))
            except Timeout:
                raise InputError(f"{run_dir} is in use by its run; wait until it has stopped") from None
        models = cfg.pipeline.models(load, tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        step = restored_step(cfg, run_dir, engine)
        computed = cfg.pipeline.finalize(models, engine, corpus)
        record = {**facts, "config": plain(cfg), **ancestry(texts_of(cfg)), **computed, "step": step}
        weights = partial(merged_weights, engine, load, cfg.pipeline.exports)
        cfg.export.write(out, weights, load, tokenizer, record)
    return step
