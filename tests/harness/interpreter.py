# SPDX-License-Identifier: Apache-2.0
"""What the V2 engine needs under Triton's interpreter, in the child process."""

from types import SimpleNamespace
from typing import Any

import torch


def stand_in() -> None:
    """Replace the kernels of vLLM that crash the interpreter, plain V2's too."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu import structured_outputs
    from vllm.v1.worker.gpu.sample import sampler, states

    def apply_top_k_top_p(
        logits: torch.Tensor,
        k: torch.Tensor | None,
        p: torch.Tensor | None,
        has_topp_only_rows: bool = False,  # vLLM 0.33's
    ) -> torch.Tensor:
        if k is None and p is None:
            return logits
        return apply_top_k_top_p_pytorch(logits, k, p)

    for module in (sampler, states):
        if hasattr(module, "apply_top_k_top_p"):
            module.apply_top_k_top_p = apply_top_k_top_p

    structured_outputs._apply_grammar_bitmask_kernel = GrammarBitmaskKernel()


class GrammarBitmaskKernel:
    """vLLM's kernel of that name, in PyTorch."""

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self.launch

    @staticmethod
    def launch(
        logits: torch.Tensor,
        stride_logits: int,
        mapping: torch.Tensor,  # request * MASK_STRIDE + position of each mask
        cu_num_logits: torch.Tensor,
        bitmask: torch.Tensor,
        stride_bitmask: int,
        vocab_size: int,
        MASK_STRIDE: int,
        BLOCK_SIZE: int,
    ) -> None:
        bits = bitmask[..., None] >> torch.arange(32) & 1
        allowed = bits.flatten(1)[:, :vocab_size].bool()
        for at, mask in zip(mapping.tolist(), allowed, strict=True):
            request, position = divmod(at, MASK_STRIDE)
            first, end = cu_num_logits[request : request + 2].tolist()
            if first + position < end:
                logits[first + position].masked_fill_(~mask, float("-inf"))


def patch_language_once() -> None:
    """Leave Triton's language interpreted between launches.

    The interpreter patches it for every launch and every call of a function in a
    kernel: a third of a step's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
