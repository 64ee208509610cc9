"""Measure a model on held-out data without training it.

    onecurve evaluate experiment=sft model.path=runs/sft/export data.train=[chats.jsonl] data.eval=[held.jsonl]
    onecurve evaluate experiment=dpo model.path=runs/dpo/export data.train=[pairs.jsonl] data.eval=[held.jsonl] --out m.json
    onecurve evaluate runs/sft data.eval=[other.jsonl]       the newest checkpoint of a run, on other data

Takes the overrides of a run and gives the metrics that its evaluation would show before the first step: the held-out loss of
data.eval and what the pipeline measures beside it. data.train is read as by the run, and not learnt from. Of a run's folder
the settings are the run's own, beside those that are given; start it in the folder in which the run was started.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.export import restored_step
from trainer.cli.parsing import add_run_arguments, parser_of
from trainer.cli.recorded import compose_recorded, record_of
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.disk import writing
from trainer.parallel import distributed


def main(arguments: Sequence[str]) -> int:
    """Print the metrics; write them where ``--out`` says."""
    parser = parser_of("evaluate", __doc__)
    add_run_arguments(parser)
    parser.add_argument("--out", type=Path, help="a JSON file for the metrics")
    a = parser.parse_intermixed_args(arguments)
    run_dir = Path(a.overrides.pop(0)) if a.overrides and "=" not in a.overrides[0] else None
    if run_dir is None:
        cfg = compose(a.overrides, config_dirs=a.config_dir, name="evaluate")
    else:
        cfg = compose_recorded(record_of(run_dir)["command"], run_dir, a.overrides)
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    corpus = cfg.open_corpus(tokenizer)
    if not corpus.heldout and not corpus.prompts(1):
        raise ConfigError(["data.eval=[] names nothing to measure on; give files, folders or hub ids"])
    with distributed.session(replica=cfg.strategy.mesh.replica) as world:
        models = cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
        step = 0 if run_dir is None else restored_step(cfg, run_dir, engine)
        measured = cfg.evaluation.measure(cfg.pipeline, models, engine, corpus.heldout, cfg.batch.micro)
        answered, _ = cfg.evaluation.answer(cfg.pipeline, models, engine, corpus, 0, cfg.seed)
        metrics = {**{name: float(value) for name, value in measured.values.items()}, **answered}
        if world.is_main:
            if run_dir is not None:
                print(f"{run_dir}: after step {step:,}")
            print("\n".join(f"{name:32} {value:.6g}" for name, value in metrics.items()))
            if a.out is not None:
                with writing(a.out):
                    a.out.write_text(json.dumps(metrics, indent=1) + "\n")
    return 0
