"""Sampling by vLLM instead of our own decoder: an engine in every rank's process, which is given the policy's weights.

Its kernels and ours round differently, so what it drew with and what the trainer computes differ: `rollout/mismatch` measures
it, and ``pipeline.importance_cap`` weighs tokens for it (truncated importance sampling).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.generation.completion import Completion
from trainer.generation.sampling import Sampling


class VLLMSampler:
    """A `Sampler`. ``folder``: where the policy's shape comes from; ``weights``: its tensors as they are now, collective."""

    def __init__(
        self,
        folder: Path,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        sampling: Sampling,
        stops: Sequence[int],
        *,
        length: int,
        memory: float,
        dtype: str,
    ) -> None:
        # The engine in this process, so that weights are handed over without a copy through another one.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        self._weights, self._sampling, self._stops = weights, sampling, list(stops)
        self._engine: Any = LLM(
            model=str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=length, gpu_memory_utilization=memory,
            enforce_eager=False, logprobs_mode="processed_logprobs", distributed_executor_backend="external_launcher",
        )  # fmt: skip

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]:
        """Completions of this rank's prompts under the policy's weights as they are now; collective."""
        self._hand_over()
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self._engine.generate(requests, [self._parameters(key) for key in keys], use_tqdm=False)
        return [self._completion(request.outputs[0]) for request in outputs]

    def _hand_over(self) -> None:
        model = self._engine.llm_engine.model_executor.driver_worker.model_runner.model
        for name, tensor in self._weights():
            model.load_weights([(name, tensor)])
        # Keys and values of the policy before are of no use to this one.
        self._engine.reset_prefix_cache()

    def _parameters(self, key: tuple[int, ...]) -> Any:
        from vllm import SamplingParams

        s = self._sampling
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big") >> 1
        return SamplingParams(
            temperature=s.temperature, top_k=s.top_k or -1, top_p=s.top_p, min_p=s.min_p, max_tokens=s.tokens, seed=seed,
            stop_token_ids=self._stops, logprobs=0, detokenize=False,
        )  # fmt: skip

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs, strict=True)]
        return Completion(ids, logprobs, ids[-1] in self._stops)
