"""Memory and time of a run on other machines than this one, before it is started.

    onecurve estimate --ranks 8 --device H100 --gb 80 experiment=1b strategy=zero2 batch.micro=8
    onecurve estimate --ranks 8 experiment=sft_7b model.path=DIR

Takes the overrides of the run (paths of data and tokenizer may be left out). Memory is a rank's peak; where it does not fit,
the nearest configuration that does is named. Time is what the operations need at --utilisation of the device's peak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from trainer.cli.parsing import add_run_arguments, parser_of
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.diagnostics.memory import advice, memory, parameters_of, seconds_per_step
from trainer.parallel.environment import imagined
from trainer.pipelines.pretrain import Pretrain
from trainer.run import Run
from trainer.tracking.throughput import PEAKS


def main(arguments: Sequence[str]) -> int:
    """Print the estimate of what the command line describes."""
    parser = parser_of("estimate", __doc__)
    add_run_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--device", default="H100", choices=[*PEAKS, "cpu"], help="what the ranks run on")
    parser.add_argument("--gb", type=float, default=80.0, help="memory of a device, GB")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of the peak that is reached")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens, where the model leaves them to the tokenizer")
    a = parser.parse_intermixed_args(arguments)
    with imagined(a.ranks):
        cfg = compose_without_data(a.overrides, a.config_dir)
        shaped = any(override.startswith(("model=", "model.hidden_size=")) for override in a.overrides)
        if cfg.model.path is None and not shaped and type(cfg.pipeline) is not Pretrain:
            raise ConfigError(
                ["model.path is required: the run starts from a model; or name a shape, such as model=7b"]
            )
        shape = cfg.model.architecture(cfg.model.vocab_size or (a.vocab if cfg.model.path is None else 1))
        layout = cfg.layout(shape, a.ranks, cuda=a.device != "cpu")
    peak = memory(shape, layout)
    print(f"{parameters_of(shape):,} parameters; a rank of {a.ranks} under strategy={cfg.strategy.name}:")
    print("\n".join(peak.lines()))
    if peak.total > a.gb * 1e9:
        print(f"does not fit {a.gb:g} GB: {advice(shape, layout, a.gb * 1e9)}")
    if a.device in PEAKS:
        flops = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
        tokens = cfg.batch.size * cfg.batch.length
        seconds = seconds_per_step(shape, layout, tokens, flops, a.utilisation)
        print(f"{seconds:.2f} s a step of {tokens:,} tokens on {a.device} at {a.utilisation:.0%} of its peak", end="")
        print(f"; {cfg.steps:,} steps: {cfg.steps * seconds / 3600:.1f} h" if cfg.steps else "")
    return 0


def compose_without_data(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Run:
    """Compose a run, with any text in the place of data that is not named: it does not decide memory."""
    try:
        return compose(overrides, config_dirs=config_dirs, name="estimate")
    except ConfigError as error:
        if all(problem.startswith("data.") for problem in error.problems):
            with tempfile.NamedTemporaryFile(suffix=".txt") as text:
                named = [*overrides, f"data.train=[{text.name}]", "data.eval=[]"]
                return compose(named, config_dirs=config_dirs, name="estimate")
        raise ConfigError([p for p in error.problems if not p.startswith("data.")]) from None
