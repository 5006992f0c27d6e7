# SPDX-License-Identifier: Apache-2.0
"""What the V2 engine needs under Triton's interpreter, in the child process."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def stand_in() -> None:
    """Replace the kernels of vLLM that crash the interpreter, plain V2's too."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu import structured_outputs
    from vllm.v1.worker.gpu.sample import sampler, states

    def apply_top_k_top_p(
        logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> torch.Tensor:
        if k is None and p is None:
            return logits
        return apply_top_k_top_p_pytorch(logits, k, p)

    for module in (sampler, states):
        if hasattr(module, "apply_top_k_top_p"):
            module.apply_top_k_top_p = apply_top_k_top_p

    def apply_grammar_bitmask(
        self: Any,
        logits: torch.Tensor,
        input_batch: Any,
        grammar_req_ids: list[str],
        grammar_bitmask: np.ndarray,
    ) -> None:
        mapping = structured_outputs._build_grammar_mapping(
            input_batch.req_ids,
            grammar_req_ids,
            input_batch.cu_num_logits_np,
            input_batch.num_draft_tokens_per_req,
            self.num_bonus_tokens,
            self.mask_stride,
        )
        assert len(mapping) == len(grammar_bitmask)
        bits = torch.from_numpy(grammar_bitmask)[..., None] >> torch.arange(32) & 1
        allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
        for at, mask in zip(mapping, allowed, strict=True):
            request, position = divmod(at, self.mask_stride)
            first, end = input_batch.cu_num_logits[request : request + 2].tolist()
            if first + position < end:
                logits[first + position].masked_fill_(~mask, float("-inf"))

    worker = structured_outputs.StructuredOutputsWorker
    worker.apply_grammar_bitmask = apply_grammar_bitmask


def patch_language_once() -> None:
    """Leave Triton's language interpreted between launches.

    The interpreter patches it for every launch and every call of a function in a
    kernel: a third of a step's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
