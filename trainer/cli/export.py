"""Turn the newest checkpoint of a run that has not come to its end into a Hugging Face folder; adapters are merged.

    onecurve export runs/sft
    onecurve export runs/sft models/sft-step-200
    torchrun --nproc-per-node 8 -m trainer export runs/sft_7b        (what takes as many ranks as training)

With --format, write a finished model in other formats and say what each cost: KL to the original, perplexity, size on disk.

    onecurve export runs/sft --format int4,gguf-q8_0                 runs/sft/export-int4/, runs/sft/export-gguf-q8_0/
    onecurve export models/smollm2 out --format nf4 --data held.jsonl        out/nf4/, of any Hugging Face folder

A run's own rows calibrate and measure; --calibration and --data name others. The run is composed again from the command in
its config.yaml, so start this in the folder in which the run was started.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.checkpoint import Checkpointer
from trainer.checkpoint.record import plain, texts_of
from trainer.cli.export_formats import add_format_arguments, export_formats
from trainer.cli.parsing import parser_of
from trainer.cli.recorded import compose_recorded, record_of
from trainer.config import InputError
from trainer.export.lineage import ancestry
from trainer.export.peft import merged_weights
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.run import Run


def main(arguments: Sequence[str]) -> int:
    """Write the folder."""
    parser = parser_of("export", __doc__)
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a run's folder; with --format also any model's")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT",
        help="the folder to write; with --format a folder of it for each; default: export/, export-FORMAT/ in the run's",
    )  # fmt: skip
    add_format_arguments(parser)
    a = parser.parse_args(arguments)
    if a.format is not None:
        return export_formats(a)
    facts = record_of(a.run_dir)
    out = a.out or a.run_dir / "export"
    if out.exists():
        raise InputError(f"{out} exists already; name another folder")
    step = export(compose_recorded(facts["command"], a.run_dir), a.run_dir, out, facts)
    print(f"{out}: the model after step {step}")
    return 0


def restored_step(cfg: Run, run_dir: Path, engine: Engine) -> int:
    """Restore the newest checkpoint that verifies; gives its step. Collective.

    Raises:
        InputError: if there is none.
    """
    step = Checkpointer(cfg.checkpoint, run_dir / "checkpoints", engine, {}, {}).restore()
    if step == 0:
        raise InputError(f"{run_dir} holds no checkpoint that can be read; let the run save one (checkpoint.every)")
    return step


def export(cfg: Run, run_dir: Path, out: Path, facts: dict[str, Any]) -> int:
    """Restore the newest checkpoint that verifies and write its model; gives its step. Collective."""
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    corpus, load = cfg.open_corpus(tokenizer), cfg.loader(tokenizer)
    with distributed.session(replica=cfg.strategy.mesh.replica) as world, ExitStack() as locks:
        if world.is_main:
            try:
                locks.enter_context(FileLock(run_dir / ".lock", timeout=0))
            except Timeout:
                raise InputError(f"{run_dir} is in use by its run; wait until it has stopped") from None
        models = cfg.pipeline.models(load, tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        step = restored_step(cfg, run_dir, engine)
        computed = {**cfg.pipeline.finalize(models, engine, corpus), **cfg.adapter.record(cfg.model.path, {})}
        record = {**facts, "config": plain(cfg), **ancestry(texts_of(cfg)), **computed, "step": step}
        weights = partial(merged_weights, engine, load, cfg.pipeline.exports)
        cfg.export.write(out, weights, load, tokenizer, record)
    return step
