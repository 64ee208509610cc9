"""How fast Onecurve generates, beside transformers' generate or vLLM: same model, same real prompts, alternating in one run.

    python scripts/benchmarks/generation.py MODEL_DIR CHATS.jsonl [--rounds 3] [--ends scheduled|none] [--dtype fp32|bf16]
    python scripts/benchmarks/generation.py MODEL_DIR CHATS.jsonl --sides onecurve,vllm --ends none --dtype bf16

Greedy, at most ``--tokens`` a completion, ``--together`` at once on both sides. ``--ends scheduled``: completion n ends by an
end token at a length that both sides are told, evenly spread from a quarter of ``--tokens`` to all of it, in an order that
says nothing about the prompt. ``--ends none``: every completion has ``--tokens``.

vLLM runs in the environment of ``make test-vllm``, without schedule, and with its cache of prefixes, since we compute what
prompts share once, too. transformers gets its prompts padded on the left,
its end token honoured. ``--clock cpu`` counts the processor's time instead of the wall's, for machines that are shared; with
one thread (OMP_NUM_THREADS=1) no waiting is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import alternate, lines_of, memory_gb

SIDES = ("onecurve", "transformers", "transformers-static", "vllm")
END = 0
"""The id that ends a scheduled completion: the model's end of text, which it does not write in a chat."""


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder with a chat template")
    parser.add_argument("chats", type=Path, help="JSON lines with messages; the first user turns are the prompts")
    parser.add_argument("--side", choices=SIDES, help="one process of the comparison")
    parser.add_argument("--sides", type=str, default="onecurve,transformers", help="what is compared")
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--together", type=int, default=64, help="prompts that are decoded at once, on both sides")
    parser.add_argument("--ends", choices=["scheduled", "none"], default="scheduled")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--kept-memory", action="store_true", help="transformers keeps freed memory too, as we do")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="the environment with vLLM")
    parser.add_argument("--profile", action="store_true", help="print where our time goes; with --side onecurve")
    a = parser.parse_args()
    if not a.side:
        if "vllm" in a.sides and a.ends != "none":
            parser.error("vLLM takes no schedule; use --ends none")
        interpreters = {"vllm": a.vllm_python}
        alternate(__file__, a.sides.split(","), a.rounds, "tokens_per_second", "tokens/s", interpreters)
        return
    side = {"onecurve": ours, "vllm": by_vllm}.get(a.side, theirs)
    with torch.no_grad():
        print(f"RESULT {json.dumps(side(a))}", flush=True)


def ours(a: argparse.Namespace) -> dict[str, Any]:
    """Continuous batching."""
    from trainer.generation.completion import RunningSequence
    from trainer.generation.decoding import Decoding
    from trainer.generation.sampling import Sampling
    from trainer.models.load import Model, ModelLoader
    from trainer.parallel.ddp import DDP

    lengths = schedule(a)

    class Scheduled(Decoding):
        """Ends every completion where the schedule says."""

        def _append(self, slots: Sequence[int], chosen: torch.Tensor) -> Iterator[RunningSequence]:
            for column, slot in enumerate(slots):
                going = self.running[slot]
                if len(going.ids) + 1 == lengths[going.number]:
                    chosen[0, column] = END
            yield from super()._append(slots, chosen)

    model = ModelLoader(Model(path=str(a.model)), DDP(), 0, 1).load().eval().to(device(), dtype(a))
    prompts, stops = prompts_of(a), [END] if a.ends == "scheduled" else []

    def run(count: int, tokens: int) -> int:
        kind = Scheduled if a.ends == "scheduled" else Decoding
        sampling = Sampling(tokens, temperature=0)
        steps = kind(model, prompts[:count], sampling, stops=stops, max_concurrent=a.together)
        return sum(len(going.ids) for going in steps if going.done)

    run(4, 4)
    if a.profile:
        with torch.profiler.profile() as profiler:
            run(len(prompts), a.tokens)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    return figures(a, lambda: run(len(prompts), a.tokens))


def theirs(a: argparse.Namespace) -> dict[str, Any]:
    """A left-padded batch after the other."""
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    lengths, prompts = schedule(a), prompts_of(a)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype(a)).eval().to(device())

    class Scheduled(LogitsProcessor):  # type: ignore[misc]
        """Leaves only the end token to the rows whose completion is to end."""

        def __init__(self, first: int, width: int, count: int) -> None:
            self.width, self.ends = width, torch.tensor(lengths[first : first + count])

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            over = (self.ends == input_ids.shape[1] - self.width + 1).nonzero()[:, 0]
            scores[over] = -torch.inf
            scores[over, END] = 0
            return scores

    def run(count: int, tokens: int) -> int:
        written = 0
        for first in range(0, count, a.together):
            part = prompts[first : min(first + a.together, count)]
            width = max(map(len, part))
            rows = torch.tensor([[END] * (width - len(p)) + p for p in part], device=device())
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device())
            settings: dict[str, Any] = {"eos_token_id": None}
            if a.ends == "scheduled":
                processor = LogitsProcessorList([Scheduled(first, width, len(part))])
                settings = {"eos_token_id": END, "logits_processor": processor}
            if a.side == "transformers-static":
                settings["cache_implementation"] = "static"
            out = model.generate(
                rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=END, **settings
            )[:, width:]
            written += sum(
                min(tokens, lengths[first + n]) if settings["eos_token_id"] == END else tokens for n in range(len(out))
            )
        return written

    model.generation_config.eos_token_id = None
    run(4, 4)
    return figures(a, lambda: run(len(prompts), a.tokens))


def by_vllm(a: argparse.Namespace) -> dict[str, Any]:
    """Its own continuous batching, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(str(a.model), dtype=str(dtype(a)).removeprefix("torch."), max_num_seqs=a.together,
                 max_model_len=512 + a.tokens)  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(a)]

    def run(count: int, tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = engine.generate(prompts[:count], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    run(4, 4)
    engine.reset_prefix_cache()  # which has these four prompts now
    return figures(a, lambda: run(len(prompts), a.tokens))


def prompts_of(a: argparse.Namespace) -> list[list[int]]:
    """The first prompts of at most 512 tokens, rendered by the model's template."""
    from trainer.data.templates import open_template
    from trainer.data.tokenizer import open_tokenizer

    template = open_template(None, open_tokenizer(a.model))
    rows = [json.loads(line)["messages"] for line in lines_of(a.chats)]
    ends = [next(n for n, message in enumerate(row) if message["role"] == "user") + 1 for row in rows]
    prompts = [template.prompt(row[:end]) for row, end in zip(rows, ends, strict=True)]
    return [prompt for prompt in prompts if len(prompt) <= 512][: a.prompts]


def schedule(a: argparse.Namespace) -> list[int]:
    """The length of every completion, its end token included: a quarter of the longest to the longest."""
    least, steps = a.tokens // 4, max(1, a.prompts - 1)
    lengths = [least + (a.tokens - least) * n // steps for n in range(a.prompts)]
    random.Random(0).shuffle(lengths)
    return lengths


def figures(a: argparse.Namespace, run: Any) -> dict[str, float]:
    """Completion tokens a second, and the process's peak memory."""
    clock = time.perf_counter if a.clock == "wall" else time.process_time
    began = clock()
    tokens = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = clock() - began
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens, "memory_gb": memory_gb()}


def dtype(a: argparse.Namespace) -> torch.dtype:
    """Of the weights."""
    return torch.float32 if a.dtype == "fp32" else torch.bfloat16


def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
