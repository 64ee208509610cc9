"""Which metrics belong into one plot, what is healthy there, and what to look for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from trainer.report.curves import Band, Level
from trainer.report.recording import Recording

Levels = Callable[[Recording], Iterator[Level]]


class Better(Enum):
    """Which way a metric should go."""

    lower = -1
    neither = 0
    higher = 1


class Manner(Enum):
    """How a curve behaves, so how it is drawn and read: noisy, without any noise, or around one value all the time."""

    noisy = "noisy"
    exact = "exact"
    steady = "steady"


@dataclass(frozen=True)
class Chart:
    """A plot of ``metrics`` (name and label); what was measured on held-out data (``eval/<name>``) is drawn in with dots.

    ``hint``: what to look for, for somebody who sees such a plot for the first time.
    """

    section: str
    title: str
    metrics: dict[str, str]
    better: Better = Better.neither
    hint: str = ""
    levels: tuple[Levels, ...] = ()
    band: Band | None = None
    log: bool = False
    manner: Manner = Manner.noisy
    weight: int = 0
    """How well it tells what a run is worth; the headline reads the weightiest."""
    against: str = ""
    """Another metric to draw over, instead of the step."""

    @property
    def key(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def at(value: float, label: str, *, optimum: bool = False) -> Levels:
    """A level that always holds."""

    def levels(run: Recording) -> Iterator[Level]:
        yield Level(value, label, optimum)

    return levels


def of_setting(*paths: str, label: str) -> Levels:
    """A level that the configuration names; none where it is 0 or not set."""

    def levels(run: Recording) -> Iterator[Level]:
        for path in paths:
            value = run.get(path)
            if isinstance(value, int | float) and value:
                yield Level(float(value), f"{label} {value:g}")
                return

    return levels


def undecided(run: Recording) -> Iterator[Level]:
    """ln 2, where the loss compares two answers and starts with no preference between them."""
    paired = "margin" in run.series or "rewards/accuracy" in run.series
    if paired and run.get("pipeline.objective", "sigmoid") in ("sigmoid", "robust"):
        yield Level(math.log(2), "ln 2: no preference yet")


ALL = at(1.0, "all", optimum=True)
CHANCE = at(0.5, "chance")
ZERO = at(0.0, "")
SECTIONS = RESULT, REWARDS, POLICY, VALUE, OPTIMISATION, MACHINE, FURTHER = (
    "Learning", "Rewards", "Policy", "Value function", "Optimisation", "Speed and memory", "Further metrics",
)  # fmt: skip
"""In their order on the page."""

CHARTS = (
    Chart(
        RESULT,
        "Loss",
        {"loss": "training"},
        Better.lower,
        "Dots are held-out data: when they turn up while training still falls, the model overfits.",
        (undecided,),
        weight=2,
    ),
    Chart(
        RESULT,
        "Bits per byte",
        {"bits_per_byte": "training"},
        Better.lower,
        "The same loss, independent of the tokenizer.",
        weight=1,
    ),
    Chart(
        RESULT,
        "Token accuracy",
        {"token_accuracy": "training"},
        Better.higher,
        "The part of learnt tokens that the model thinks likeliest.",
        (ALL,),
        weight=1,
    ),
    Chart(
        RESULT,
        "Exact answers",
        {"exact_match": "training"},
        Better.higher,
        "The part of held-out questions whose answer is right, letter for letter.",
        (ALL,),
        weight=5,
    ),
    Chart(
        RESULT,
        "Answers that end",
        {"completion/eos_fraction": "sampled", "ended": "training"},
        Better.higher,
        "The rest was cut at the length limit; near 0 the end-of-turn token was never learnt.",
        (ALL,),
    ),
    Chart(
        RESULT,
        "Gold reward",
        {"objective/gold": "gold"},
        Better.higher,
        "The true reward, which the policy does not see.",
        weight=6,
    ),
    Chart(
        RESULT,
        "Preference accuracy",
        {"accuracy": "training", "rewards/accuracy": "training"},
        Better.higher,
        "How often the chosen answer is ahead.",
        (ALL, CHANCE),
        weight=4,
    ),
    Chart(
        REWARDS,
        "Score of the answers",
        {"objective/score": "score"},
        Better.higher,
        "What the reward model says, before the price of KL.",
        weight=3,
    ),
    Chart(
        REWARDS,
        "Gold against proxy",
        {"objective/score": "proxy (reward model)", "objective/gold": "gold"},
        Better.higher,
        "When the proxy goes on rising and gold turns down, the policy exploits the reward model.",
    ),
    Chart(
        REWARDS,
        "Reward against KL",
        {"objective/score": "score", "objective/gold": "gold"},
        Better.higher,
        "What a unit of distance from the reference buys; the curve bends when it buys less.",
        against="objective/kl",
    ),
    Chart(
        REWARDS,
        "Reward with KL",
        {"objective/reward": "reward"},
        Better.higher,
        "The score less the price of KL: what is optimised.",
        weight=1,
    ),
    Chart(
        REWARDS,
        "Margin",
        {"margin": "training", "rewards/margin": "training"},
        Better.higher,
        "How far the chosen answer is ahead of the rejected one.",
        (ZERO,),
        weight=1,
    ),
    Chart(
        REWARDS,
        "Implicit rewards",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        hint="Both fall in most runs; what counts is the gap.",
        levels=(ZERO,),
    ),
    Chart(
        REWARDS,
        "Log-probability of answers",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        hint="When the chosen answers' falls far, the policy forgets how to write them.",
    ),
    Chart(
        REWARDS,
        "Scores",
        {"score/max": "highest", "score/mean": "mean", "score/min": "lowest"},
        hint="Centred scores keep the mean near 0.",
        levels=(ZERO,),
    ),
    Chart(
        POLICY,
        "KL from the reference",
        {"objective/kl": "KL a sequence", "kl": "KL"},
        hint="How far the policy has moved; a sudden rise precedes a collapse.",
        levels=(of_setting("pipeline.kl_target", label="target"),),
    ),
    Chart(
        POLICY,
        "Probability ratio",
        {"policy/ratio_mean": "mean ratio"},
        hint="New over old probability of a token: 1 on the first mini-batch, and near it afterwards.",
        levels=(at(1.0, "unchanged policy"),),
    ),
    Chart(
        POLICY,
        "Clip fraction",
        {"policy/clip_fraction": "policy"},
        hint="Tokens whose ratio left the trust region: too many, and the step is too large.",
        band=Band(0, 0.3),
    ),
    Chart(
        POLICY,
        "KL of an update",
        {"policy/approx_kl": "approximate KL"},
        hint="Between the policy that sampled and the one that learns.",
        band=Band(0, 0.05),
    ),
    Chart(POLICY, "Policy loss", {"policy/loss": "policy"}),
    Chart(
        POLICY,
        "Entropy",
        {"objective/entropy": "sampling", "policy/entropy": "learning", "entropy": "training"},
        hint="Falling to nothing means that the policy says one thing only.",
    ),
    Chart(
        POLICY,
        "Sampler against trainer",
        {"rollout/mismatch": "difference"},
        hint="Of a token's log-probability, when it was sampled and when it was read again: rounding, and no more.",
        log=True,
    ),
    Chart(POLICY, "Price of KL", {"objective/kl_price": "price"}, manner=Manner.exact),
    Chart(
        POLICY,
        "Length of completions",
        {"completion/length_mean": "tokens"},
        hint="Reward models often like long answers: watch it beside the score.",
    ),
    Chart(
        VALUE,
        "Explained variance",
        {"value/explained_variance": "explained"},
        Better.higher,
        "How much of the returns the critic foresees; below 0 it is worse than a constant.",
        (at(1.0, "perfect", optimum=True), ZERO),
    ),
    Chart(VALUE, "Values", {"value/mean": "mean"}, hint="Of the critic; they should follow the rewards."),
    Chart(VALUE, "Value loss", {"value/loss": "value"}, Better.lower),
    Chart(VALUE, "Value clip fraction", {"value/clip_fraction": "value"}, band=Band(0, 0.3)),
    Chart(
        OPTIMISATION,
        "Gradient norm",
        {"grad_norm": "before clipping"},
        hint="Steady is good; spikes point at bad rows or too high a rate.",
        levels=(of_setting("optimizer.clip", label="clipped at"),),
        log=True,
    ),
    Chart(OPTIMISATION, "Learning rate", {"lr": "rate"}, manner=Manner.exact),
    Chart(OPTIMISATION, "Skipped steps", {"skipped": "so far"}, manner=Manner.exact),
    Chart(
        MACHINE,
        "Throughput",
        {"tokens_per_second": "tokens a second"},
        hint="Without evaluations and checkpoints.",
        manner=Manner.steady,
    ),
    Chart(
        MACHINE,
        "Utilisation",
        {"mfu": "of the device's peak"},
        hint="Model FLOP utilisation: the part of the peak that the model's own products use.",
        manner=Manner.steady,
    ),
    Chart(MACHINE, "Memory", {"memory_gb": "GB"}, hint="The most that a rank has held so far.", manner=Manner.exact),
    Chart(
        MACHINE,
        "Slowest rank",
        {"straggler/slowness": "of the median rank's time"},
        hint="How long the slowest rank takes before all meet; well above 1 throughout, one rank holds up the others.",
        manner=Manner.steady,
    ),
)
UNDERSTOOD = "policy/loss"
"""A run with this metric learns from its own samples: its whole loss, whose scale changes with them, is no result."""
HELD_OUT = {"completion/length_mean": "eval/length"}
"""What a metric is called on held-out data where it is not ``eval/<name>``."""
HIDDEN = (
    "tokens",
    "skipped_in_a_row",
    "score/std",
    "completion/length_max",
    "objective/score_std",
    "objective/missing",
    "straggler/waiting",
    "straggler/rank",
)
"""Metrics without a plot of their own."""
