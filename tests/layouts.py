"""Which kinds of run are tried on which layouts: every layout and every kind, but not each with each."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from trainer.parallel.fsdp import FSDP

Layout = tuple[int, str]
LAYOUTS: list[Layout] = [(2, "zero3"), (2, "fsdp"), (2, "ddp"), (2, "zero1"), (2, "zero2"), (1, "zero3")]


DIVIDES_EXPERTS = not list(FSDP(expert=2).problems())
PACKS_UNDER_FSDP = not list(FSDP().validate_packed())
"""Not with every torch that is allowed."""
needs_divided_experts = pytest.mark.skipif(not DIVIDES_EXPERTS, reason="strategy.expert is refused with this torch")


def overrides(strategy: str) -> list[str]:
    """What a command line says of a layout's strategy, and of the axes of its mesh behind the name (``fsdp tensor=2``)."""
    name, *axes = strategy.split()
    return [f"strategy={name}", *(f"strategy.{axis}" for axis in axes)]


def covering(
    kinds: Iterable[str], quick: Collection[tuple[str, Layout]], meshes: Collection[tuple[str, Layout]] = ()
) -> list[Any]:
    """Cases (kind, ranks, strategy): the quick ones, slow ones in which each layout without a quick case comes once, the
    kinds taking turns, and slow ones on ``meshes``. Engines and checkpoints are tried on all layouts in tests/distributed;
    here is shown that a pipeline adds nothing that depends on them.
    """
    kinds = list(kinds)

    def case(kind: str, layout: Layout, marks: Any = pytest.mark.slow) -> Any:
        return pytest.param(kind, *layout, id=f"{layout[0]}-{layout[1].replace(' ', '-')}-{kind}", marks=marks)

    rest = [layout for layout in LAYOUTS if layout not in {layout for _, layout in quick}]
    without = [kind for kind in kinds if kind not in {kind for kind, _ in quick}]
    turns = [*without, *(kind for kind in kinds if kind not in without)]
    return [
        *(case(kind, layout, marks=()) for kind, layout in quick),
        # A kind without a quick case runs under ZeRO-3 too, where a pipeline most easily goes wrong.
        *(case(kind, (2, "zero3")) for kind in without),
        *(case(turns[number % len(turns)], layout) for number, layout in enumerate(rest)),
        *(case(kind, layout) for kind, layout in meshes),
    ]
