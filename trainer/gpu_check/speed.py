"""Sections on speed: generation, compilation, and the part of the device's peak that training reaches."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from trainer.compose import compose
from trainer.diagnostics.memory import memory
from trainer.generation.completion import RunningSequence
from trainer.generation.decode_graph import FixedDecoder
from trainer.generation.decoding import Decoding
from trainer.generation.sampling import Sampling
from trainer.gpu_check.bench import SMALL, TINYWORLD, Bench, Training, random_rows
from trainer.gpu_check.kernels import copy_bandwidth
from trainer.models.load import Model, ModelLoader
from trainer.models.recompute import Recompute
from trainer.models.sizes import parameters_of
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.tracking.throughput import measured_flops, peak_memory_gb, training_flops

PROMPTS = [[3 + n % 90, 1, 4, 1, 5, 9, 2, 6] for n in range(64)]


class UncapturedDecoder(FixedDecoder):
    """The same steps, launched one operation after the other."""

    def _captured(self, model: nn.Module, span: int) -> Any:
        return partial(self._compute, span=span)


def generation(bench: Bench) -> None:
    """A graph decodes what the same operations decode without one, and what the CPU does; then tokens a second."""
    shape = Model(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, initializer_range=0.1,
    )  # fmt: skip
    model = ModelLoader(shape, DDP(), 1, 200).load().eval()
    sampling = Sampling(48, 0.9, top_p=0.9)
    on_cpu = _decode(model, 6, sampling, fixed=False)
    model.to(bench.device)
    graph, plain = (_decode(model, 6, sampling, fixed=True, uncaptured=uncaptured) for uncaptured in (False, True))
    bench.require(graph == plain, "a graph decodes other tokens than the same operations without one")
    bench.require(graph == on_cpu, "the device samples other tokens in float32 than the CPU")
    bench.require(
        _decode(model, 6, sampling, fixed=True) == graph, "the same graph decodes other tokens the second time"
    )
    del model
    _rates(bench)


def _decode(
    model: nn.Module, prompts: int, sampling: Sampling, *, fixed: bool, uncaptured: bool = False
) -> list[list[int]]:
    steps = Decoding(model, PROMPTS[:prompts], sampling, stops=(7,), max_concurrent=4, fixed=fixed)
    if uncaptured:
        steps._decoder = UncapturedDecoder(model, 4, len(PROMPTS[0]) + sampling.tokens, sampling)
        steps.cache = steps._decoder.cache
    done: dict[int, RunningSequence] = {going.number: going for going in steps if going.done}
    return [done[n].ids for n in range(prompts)]


def _rates(bench: Bench) -> None:
    """Tokens a second, and how many times longer a step takes than reading the weights once."""
    shape = _shape("smollm2-135m", 49152) if not bench.reduced else Model(hidden_size=64, num_hidden_layers=2)
    model = ModelLoader(shape, DDP(), 1, 512).load().eval().to(bench.device)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    floor = sum(p.nbytes for p in model.parameters()) / (copy_bandwidth(bench) * 1e9)
    tokens = 8 if bench.reduced else 256
    for slots in (1, 16, 64):
        for graph in (True, False):

            def decode(slots: int = slots, graph: bool = graph) -> None:
                steps = Decoding(model, PROMPTS[:slots], Sampling(tokens), stops=(), max_concurrent=64, fixed=True)
                if not graph:
                    steps._decoder = UncapturedDecoder(model, slots, len(PROMPTS[0]) + tokens, Sampling(tokens))
                    steps.cache = steps._decoder.cache
                for _ in steps:
                    pass

            decode()
            seconds, name = bench.seconds(decode), f"{'graph' if graph else 'eager'}_{slots}"
            bench.note(f"{name}_tokens_per_second", slots * tokens / seconds)
            bench.note(f"{name}_over_floor", seconds / tokens / floor)


def _shape(name: str, vocabulary: int) -> Model:
    return compose([f"model={name}", f"model.vocab_size={vocabulary}", "model.compile=false"]).model


def compiling(bench: Bench) -> None:
    """Compiled training gives the losses of plain training, in graphs that neither break nor are compiled again."""
    from torch._dynamo.utils import counters

    losses = {}
    with distributed.session():
        for compiled in (False, True):
            torch.compiler.reset()
            counters.clear()
            with bench.training(*SMALL, *TINYWORLD, "precision=bf16", "model.compile=false") as training:
                if compiled:
                    # On a CPU compiling takes longer than everything else: there only the graphs are made.
                    training.engine.module.compile_blocks("aot_eager" if bench.reduced else "inductor")  # type: ignore[operator]
                losses[compiled] = [float(training.step()["loss"]) for _ in range(2)]
                early = counters["stats"]["unique_graphs"]
                losses[compiled].append(float(training.step()["loss"]))
                _use_between_steps(training)
                losses[compiled].append(float(training.step()["loss"]))
    late = counters["stats"]["unique_graphs"] - early
    bench.note("graphs", early)
    bench.at_most("graphs_after_the_second_step", late, 0)
    # On a CPU attention stays outside.
    bench.at_most("graph_breaks", sum(counters["graph_break"].values()), math.inf if bench.reduced else 0)
    apart = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
    bench.at_most("loss_difference", apart, 0.02 * max(losses[False]))
    bench.require(early > 0, "nothing was compiled")


def _use_between_steps(training: Training) -> None:
    """Evaluate and generate, as a run does."""
    with training.engine.evaluating(), training.engine.gathered() as module:
        training.cfg.pipeline.loss(training.models, training.micro_batches()[0].to(training.engine.device))
        for _ in Decoding(module, PROMPTS[:4], Sampling(4), stops=()):
            pass


def utilisation_125m(bench: Bench) -> None:
    """Part of the peak, measured in this process, that training of 125m reaches; memory beside the estimate."""
    _utilisation(bench, "125m", 50304, 16, 1024)


def utilisation_1b(bench: Bench) -> None:
    """As for 125m, of 1b."""
    _utilisation(bench, "1b", 128256, 4, 2048)


def _utilisation(bench: Bench, name: str, vocabulary: int, rows: int, length: int) -> None:
    size, seconds = (256, 0.05) if bench.reduced else (8192, 1.0)
    peak = measured_flops(bench.device, torch.bfloat16, size, seconds)
    bench.note("peak_tflops", peak / 1e12)
    shape = [*SMALL, "model.vocab_size=512"] if bench.reduced else [f"model={name}", f"model.vocab_size={vocabulary}"]
    rows, length = (2, 128) if bench.reduced else (rows, length)
    batch = [f"batch.size={2 * rows}", f"batch.micro={rows}", f"batch.length={length}"]
    data = [*TINYWORLD[:-3], *batch, "precision=bf16", "model.activation_checkpointing=none"]
    with distributed.session(), bench.training(*shape, *data, "model.compile=false") as training:
        for compiled, recompute in product((False,) if bench.reduced else (False, True), Recompute):
            variant = f"{'compiled' if compiled else 'eager'}_{recompute}"
            bench.attempt(variant, partial(_measure, bench, training, variant, recompute, peak))
            gc.collect()
            torch.cuda.empty_cache()


def _measure(bench: Bench, training: Training, variant: str, recompute: Recompute, peak: float) -> None:
    """Steps of one variant; the first ones warm up and compile."""
    module, cfg = training.engine.module, training.cfg
    module.recompute = recompute  # type: ignore[assignment]
    if variant.startswith("compiled"):
        module.compile_blocks()  # type: ignore[operator]
    a = module.architecture
    batches: Sequence[Any] = [random_rows(a.vocab_size, cfg.batch.micro, cfg.batch.length) for _ in range(2)]  # type: ignore[union-attr,arg-type]
    for _ in range(2):
        training.step(batches)
    if not bench.reduced:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(lambda: training.step(batches), 1 if bench.reduced else 5)
    tokens = cfg.batch.size * cfg.batch.length
    flops = training_flops(a, tokens, sum(batch.attention_pairs for batch in batches))  # type: ignore[arg-type]
    bench.note(f"{variant}_mfu", flops / seconds / peak)
    bench.note(f"{variant}_tokens_per_second", tokens / seconds)
    if not bench.reduced:
        layout = cfg.layout(a, 1, cuda=True)  # type: ignore[arg-type]
        layout = type(layout)(**{**vars(layout), "recompute": recompute})
        used, predicted = peak_memory_gb(bench.device), memory(a, layout).total / 1e9  # type: ignore[arg-type]
        bench.note(f"{variant}_memory_gb", used)
        bench.note(f"{variant}_estimated_gb", predicted)
        bench.require(
            abs(math.log(used / predicted)) < 0.3, f"{variant}: {used:.1f} GB used, {predicted:.1f} predicted"
        )
    bench.figures.setdefault("parameters", parameters_of(a))
