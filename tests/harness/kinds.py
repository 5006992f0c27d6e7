# SPDX-License-Identifier: Apache-2.0
"""Kinds of attention on which a step is one chain, and what is asked of them."""

from typing import Any

from tests.harness.jobs import prompts, request

CHAIN = {"window_size": 0, "ngram_size": 4, "verification_set_size": 1}
# vLLM's CPU kernel for interleaved rotary positions gets all but the first row wrong
# where rows are strided, as those of latent attention are: plain vLLM, too, says
# something else in a batch than alone. In PyTorch it is right.
TORCH_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
# A model of `architectures.py`: options of `LLM` that it needs.
EVERY_KIND: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": TORCH_ROPE,  # latent attention
    "GptOssForCausalLM": {},  # sinks, a window in every other layer
    "Llama4ForCausalLM": {},  # chunked local attention
    "BloomForCausalLM": {},  # ALiBi
}
MORE_MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": TORCH_ROPE,
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "MistralForCausalLM": {},
}


def tight(name: str) -> dict[str, int]:
    """Limits under which a step reads a part of a prompt, and requests are preempted.

    Windows and chunks end within prompts.
    """
    blocks = {"BloomForCausalLM": 12, "MistralForCausalLM": 8}
    return {
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": blocks.get(name, 20),
    }


def mixed_jobs(count: int, max_tokens: int) -> list[list[dict[str, Any]]]:
    """Greedy, seeded, off and with a smaller N side by side; then prefixes shared."""
    own: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 3},
        {"extra_args": {"lookahead": 0}},
        {"temperature": 0.9, "top_k": 20, "seed": 5},
        {"extra_args": {"lookahead_ngram_size": 2}},
    ]
    shared = list(range(2, 92)) + list(range(9, 60))
    texts = prompts(count, seed=17, longest=120)
    tails = prompts(count, seed=18, longest=20)
    first = [
        request(t, max_tokens=max_tokens, **own[i % len(own)])
        for i, t in enumerate(texts)
    ]
    second = [
        request(shared + t, max_tokens=max_tokens, **own[i % len(own)])
        for i, t in enumerate(tails)
    ]
    return [first, second, second]
