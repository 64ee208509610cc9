"""Sampling by vLLM instead of our own decoder: an engine in every rank's process, which is given the policy's weights.

Its kernels and ours round differently, so what it drew with and what the trainer computes differ: `rollout/mismatch` measures
it, and ``pipeline.importance_cap`` weighs tokens for it (truncated importance sampling).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.disk import write_text
from trainer.generation.completion import Completion
from trainer.generation.sampling import Sampling
from trainer.models.architecture import Architecture
from trainer.models.families import FAMILIES
from trainer.models.hf_format import config_json
from trainer.parallel import distributed


def filter_problems(sampling: Sampling) -> Iterator[str]:
    """Yield why vLLM cannot draw as ``sampling`` says, with log-probabilities that are those before the filters.

    At temperature 1 it gives those of the plain logits. At another one it only gives those of what the filters keep, which
    are larger: importance weights would have a mean below 1 (0.63 at top_k=20).
    """
    if sampling.filters and sampling.temperature not in (0, 1):
        yield (
            f"pipeline.rollout.temperature={sampling.temperature:g} with top_k, top_p or min_p gives no unfiltered "
            "log-probabilities with engine=vllm; use temperature=1, no filter, or engine=own"
        )
    if sampling.min_p and sampling.top_p < 1:
        yield (
            f"pipeline.rollout.min_p={sampling.min_p:g} with top_p={sampling.top_p:g} filters in another order with "
            "engine=vllm; use one of them, or engine=own"
        )


class VLLMSampler:
    """A `Sampler` (trainer.rl.actor).

    architecture: the policy's
    weights: its tensors by Hugging Face name as they are now; collective
    sampling: how completions are drawn
    stops: ids that end a completion, and nothing else does but the limit
    length: tokens of the longest sequence, the last one of its completion included
    memory: part of a GPU's memory that the engine may take
    max_concurrent: completions that are decoded at once
    dtype: what it computes in
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        sampling: Sampling,
        stops: Sequence[int],
        *,
        length: int,
        memory: float,
        max_concurrent: int,
        dtype: torch.dtype,
    ) -> None:
        # The engine in this process, so that weights are handed over without a copy through another one.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._weights, self._sampling, self._stops = weights, sampling, list(stops)
        self._architecture = architecture
        # Without filters both are the same at temperature 1; with them only the raw ones are those before the filters.
        logprobs = "raw_logprobs" if sampling.temperature in (0, 1) else "processed_logprobs"
        # Its launcher for several ranks reads torchrun's variables, which one rank on its own does not have.
        launcher = {"distributed_executor_backend": "external_launcher"} if distributed.world().devices > 1 else {}
        with tempfile.TemporaryDirectory() as folder:
            _write_shape(Path(folder), architecture, length, dtype)
            self._engine: Any = LLM(
                model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."),
                max_model_len=length, max_num_seqs=max_concurrent, gpu_memory_utilization=memory, logprobs_mode=logprobs,
                **launcher,
            )  # fmt: skip

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]:
        """Completions of this rank's prompts under the policy's weights as they are now; collective."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._named_weights()})
        # Keys and values of the policy before are of no use to this one.
        self._engine.reset_prefix_cache()
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self._engine.generate(requests, [self._parameters(key) for key in keys], use_tqdm=False)
        return [self._completion(request.outputs[0]) for request in outputs]

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        a = self._architecture
        for name, tensor in FAMILIES[a.family].stored(iter(self._weights()), a):
            yield name, tensor
            if a.tie_word_embeddings and name == "model.embed_tokens.weight":
                # On CPU it packs a copy for the projection, which would stay as it was.
                yield "lm_head.weight", tensor

    def _parameters(self, key: tuple[int, ...]) -> Any:
        from vllm import SamplingParams

        s = self._sampling
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big") >> 1
        return SamplingParams(
            temperature=s.temperature, top_k=s.top_k or -1, top_p=s.top_p, min_p=s.min_p, max_tokens=s.tokens, seed=seed,
            stop_token_ids=self._stops, ignore_eos=True, logprobs=0, detokenize=False,
        )  # fmt: skip

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs, strict=True)]
        return Completion(ids, logprobs, ids[-1] in self._stops)


def _write_shape(folder: Path, architecture: Architecture, length: int, dtype: torch.dtype) -> None:
    """A folder without weights, from which vLLM learns the policy's shape; room for ``length`` tokens."""
    positions = max(architecture.max_position_embeddings, length)
    shape = dataclasses.replace(architecture, max_position_embeddings=positions)
    config = config_json(shape, dtype, {})
    write_text(folder / "config.json", json.dumps(config))
