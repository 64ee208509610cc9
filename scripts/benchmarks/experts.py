"""Experts by grouped products beside a loop over them: tokens a second of a layer, forward and backward.

    python scripts/benchmarks/experts.py [--tokens 512] [--rounds 5] [--precision bf16]

At SmolLM2's width, 8 experts of 1536 with 2 a token, and 64 of 256 with 8. Sides alternate; the figure to read is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.models.architecture import Architecture, Layer
from trainer.models.experts import Experts

WIDTH = 576
SIZES = ((8, 2, 1536), (64, 8, 256))
"""Experts, those of a token, and their width."""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    print(f"{a.tokens} tokens of {WIDTH}, {a.precision}, {device.type}, torch {torch.__version__}; tokens a second")
    for experts, choices, size in SIZES:
        times = rounds(layer_of(experts, choices, size).to(device, dtype), choices, a)
        ratios = [slow / fast for fast, slow in zip(times["grouped"], times["loop"], strict=True)]
        grouped, looped = (a.tokens / statistics.median(seconds) for seconds in times.values())
        print(
            f"{experts:3} experts of {size}, {choices} a token: grouped {grouped:9,.0f}, loop {looped:9,.0f}; "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def rounds(layer: Experts, choices: int, a: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round, by side; one round before them is not timed."""
    like = layer.down_proj.weight
    x = torch.randn(a.tokens, WIDTH, device=like.device, dtype=like.dtype, requires_grad=True)
    weights, chosen = torch.rand(a.tokens, layer.experts, device=like.device).topk(choices)
    sides: dict[str, Callable[..., Tensor]] = {"grouped": layer, "loop": partial(loop, layer)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(a.rounds + 1):
        for name in sides if number % 2 == 0 else reversed(sides):
            seconds = timed(sides[name], layer, x, chosen, weights)
            times[name] += [seconds] if number else []
    return times


def layer_of(experts: int, choices: int, size: int) -> Experts:
    """The experts of a layer."""
    shape = Architecture(
        vocab_size=2, hidden_size=WIDTH, intermediate_size=size, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=2048, layers=(Layer(sparse=True),), experts=experts, experts_per_token=choices,
        expert_size=size,
    )  # fmt: skip
    layer = Experts(shape)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def loop(layer: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The same, an expert at a time, without the tensor of zeros that indexing a stacked weight costs in the backward."""
    out = torch.zeros_like(x)
    for number, (gate_up, down) in enumerate(
        zip(layer.gate_up_proj.weight.unbind(), layer.down_proj.weight.unbind(), strict=True)
    ):
        token, choice = (chosen == number).nonzero(as_tuple=True)
        if len(token):
            gate, up = (x[token] @ gate_up.T).chunk(2, -1)
            mine = (F.silu(gate) * up) @ down.T
            out = out.index_add(0, token, (mine * weights[token, choice, None]).to(x.dtype))
    return out


def timed(side: Callable[..., Tensor], layer: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> float:
    """Seconds of a forward and a backward."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    wait()
    started = time.perf_counter()
    side(x, chosen, weights).float().square().sum().backward()  # type: ignore[no-untyped-call]
    wait()
    return time.perf_counter() - started


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
