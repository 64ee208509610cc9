"""Sections on single operations: how fast the device is, and whether attention and a model come out as on the CPU."""

from __future__ import annotations

import platform
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from trainer.batch import Branches, Documents
from trainer.functional import cross_entropy, logits
from trainer.gpu_check.bench import Bench
from trainer.models.attention import Scores, attend
from trainer.models.load import Model, ModelLoader
from trainer.models.transformer import Transformer
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.tracking.throughput import measured_flops, peak_flops

LENGTHS = [1, 3, 64, 130, 57]
"""Of the documents of a row."""


def device(bench: Bench) -> None:
    """Versions, what the device reaches, and what the table of peaks says of it."""
    bench.figures["torch"], bench.figures["python"] = torch.__version__, platform.python_version()
    if not bench.reduced:
        bench.figures["device"] = torch.cuda.get_device_name()
        bench.figures["cuda"] = str(torch.version.cuda)
        bench.note("memory_gb", torch.cuda.get_device_properties(0).total_memory / 1e9)
    size, seconds = (256, 0.05) if bench.reduced else (8192, 1.0)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        bench.note(f"{name}_tflops", measured_flops(bench.device, dtype, size, seconds) / 1e12)
    if not bench.reduced:
        bench.note("bfloat16_peak_tflops", peak_flops(bench.device, torch.bfloat16) / 1e12)
    bench.note("copy_gb_per_second", copy_bandwidth(bench))


def copy_bandwidth(bench: Bench) -> float:
    """GB that the device reads and writes in a second, copying."""
    source = torch.zeros(4_000_000 if bench.reduced else 500_000_000, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 5) / 1e9


def varlen(bench: Bench) -> None:
    """Attention over packed documents in bfloat16 against a dense float32 softmax: windows, groups, sizes, gradients."""
    with distributed.session():  # as in a run, with FlashAttention 3 where it is taken
        if not bench.reduced:
            bench.figures["kernels"] = current_flash_attention_impl() or "FA2"
        _compare_attention(bench)


def _compare_attention(bench: Bench) -> None:
    heads = [(4, 4), (6, 1)] if bench.reduced else [(4, 4), (4, 2), (6, 1)]
    sizes = [64] if bench.reduced else [64, 128, 256]
    worst = {"output": 0.0, "gradient": 0.0}
    for (query_heads, key_heads), size, window in product(heads, sizes, (None, 5, 64)):
        draw = torch.Generator().manual_seed(0)
        shapes = [(1, sum(LENGTHS), count, size) for count in (query_heads, key_heads, key_heads, query_heads)]
        *inputs, upstream = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
        exact = _with_gradients([t.float() for t in inputs], upstream.float(), partial(_dense, window=window))
        documents = Documents.from_lengths(LENGTHS, 1).to(bench.device)
        ours = partial(attend, documents=documents, scores=Scores(size**-0.5, window))
        mine = _with_gradients([t.to(bench.device) for t in inputs], upstream.to(bench.device), ours)
        errors = [_relative(a, b) for a, b in zip(mine, exact, strict=True)]
        worst = {"output": max(worst["output"], errors[0]), "gradient": max(worst["gradient"], *errors[1:])}
    for name, error in worst.items():
        # A bfloat16 has 8 bits, and a gradient is a sum of products of two that were rounded.
        bench.at_most(f"{name}_error", error, {"output": 0.01, "gradient": 0.02}[name])


def _with_gradients(inputs: list[Tensor], upstream: Tensor, attention: partial[Tensor]) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    out = attention(q, k, v)
    return [out, *torch.autograd.grad(out, [q, k, v], upstream)]


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax over a mask that is written out, one document after the other."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    parts = []
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for first, last in pairwise(ends):
        place = torch.arange(last - first)
        seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - (window or last))
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, first:last], k[:, first:last]) * q.shape[3] ** -0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, first:last]))
    return torch.cat(parts, 1)


def _relative(a: Tensor, b: Tensor) -> float:
    """The norm of a difference over that of the second."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def model(bench: Bench) -> None:
    """Logits and gradients in bfloat16 against float32 on the CPU; packed = alone, shared prompts = separate ones."""
    exact, ours = (_small_model() for _ in range(2))
    ours.to(bench.device)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(200, (1, sum(LENGTHS)), generator=draw)
    documents = Documents.from_lengths(LENGTHS, 1)
    wanted = _logits(exact, tokens, documents)
    bench.at_most("logits_float32_error", _relative(_logits(ours, tokens, documents), wanted), 1e-4)
    prompt, first, last = tokens[:, :40], tokens[:, 40:60], tokens[:, 60:90]
    apart = [torch.cat([prompt, answer], 1) for answer in (first, last)]
    one, other = (_logits(exact, row, Documents.from_lengths([row.shape[1]], 1)) for row in apart)
    separate = torch.cat([one, other[:, 40:]], 1)
    shared = Branches.of([[*range(60)], [*range(40), *range(60, 90)]], 90)
    with torch.autocast(bench.device.type, torch.bfloat16):
        bench.at_most("logits_error", _relative(_logits(ours, tokens, documents), wanted), 0.02)
        alone = [
            _logits(ours, part, Documents.from_lengths([part.shape[1]], 1)) for part in torch.split(tokens, LENGTHS, 1)
        ]
        bench.at_most("alone_error", _relative(torch.cat(alone, 1), wanted), 0.02)
        bench.at_most("shared_error", _relative(_logits(ours, tokens[:, :90], shared), separate), 0.02)
        _backward(ours, tokens, documents)
    _backward(exact, tokens, documents)
    mine, theirs = (torch.cat([g.flatten().cpu() for g in _gradients(m)]) for m in (ours, exact))
    bench.at_most("gradient_error", _relative(mine, theirs), 0.03)


def _gradients(model: Transformer) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _small_model() -> Transformer:
    shape = Model(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, sliding_window=48, family="mistral",
    )  # fmt: skip
    return ModelLoader(shape, DDP(), 1, 200).load().eval()


def _logits(model: Transformer, tokens: Tensor, documents: Documents | Branches) -> Tensor:
    where = next(model.parameters()).device
    with torch.no_grad():
        out: Tensor = model(tokens.to(where), documents.to(where), logits)
    return out


def _backward(model: Transformer, tokens: Tensor, documents: Documents) -> None:
    where = next(model.parameters()).device
    read = partial(cross_entropy, targets=tokens.roll(-1, 1).to(where), mask=torch.ones(tokens.shape, device=where))
    loss, _, _ = model(tokens.to(where), documents.to(where), read)
    loss.backward()
