"""Memory and time of a run on other machines than this one, before it is started.

    python scripts/estimate.py --ranks 8 --device H100 --gb 80 experiment=1b strategy=zero2 batch.micro=8

takes the overrides of the run (paths of data and tokenizer may be left out). Memory is a rank's peak; where it does not fit,
the nearest configuration that does is named. Time is what the operations need at --utilisation of the device's peak.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile


def main() -> None:
    """Print the estimate of what the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--device", default="H100", help="a device of trainer/throughput.py's table, or cpu")
    parser.add_argument("--gb", type=float, default=80.0, help="memory of a device, GB")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of the peak that is reached")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens, where the model leaves them to the tokenizer")
    a, overrides = parser.parse_known_args()
    os.environ.update(RANK="0", WORLD_SIZE=str(a.ranks), MASTER_ADDR="localhost", MASTER_PORT="1")

    from hydra import compose, initialize_config_dir

    from trainer import estimate
    from trainer.__main__ import config_folder, refusal, register, spelling_tolerant
    from trainer.config import ConfigError, parse
    from trainer.throughput import PEAKS

    try:
        register(overrides)
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = parse_without_data(compose, parse, ["name=estimate", *map(spelling_tolerant, overrides)])
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        sys.exit(2)
    cuda = a.device != "cpu"
    shape = cfg.model.architecture(cfg.model.vocab_size or (a.vocab if cfg.model.path is None else 1))
    layout = cfg.layout(shape, a.ranks, cuda=cuda)
    found = estimate.memory(shape, layout)
    print(f"{estimate.parameters_of(shape):,} parameters; a rank of {a.ranks} under strategy={cfg.strategy.name}:")
    print("\n".join(found.lines()))
    if found.total > a.gb * 1e9:
        print(f"does not fit {a.gb:g} GB: {estimate.advice(shape, layout, a.gb * 1e9)}")
    if a.device in PEAKS:
        peak = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
        tokens = cfg.batch.size * cfg.batch.length
        seconds = estimate.seconds_per_step(shape, layout, tokens, peak, a.utilisation)
        print(f"{seconds:.2f} s a step of {tokens:,} tokens on {a.device} at {a.utilisation:.0%} of its peak", end="")
        print(f"; {cfg.steps:,} steps: {cfg.steps * seconds / 3600:.1f} h" if cfg.steps else "")


def parse_without_data(compose, parse, overrides):  # type: ignore[no-untyped-def]
    """The configuration, with any text in the place of data that is not named: it does not decide memory."""
    from trainer.config import ConfigError

    try:
        return parse(compose("train", overrides=overrides))
    except ConfigError as error:
        if not all(problem.startswith("data.") for problem in error.problems):
            raise
    with tempfile.NamedTemporaryFile(suffix=".txt") as any_text:
        return parse(compose("train", overrides=[*overrides, f"data.train=[{any_text.name}]", "data.eval=[]"]))


if __name__ == "__main__":
    main()
