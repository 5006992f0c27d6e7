# SPDX-License-Identifier: Apache-2.0
"""What the V2 engine needs under Triton's interpreter, in the child process."""

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


def use_oracles() -> None:
    """Run lookahead on the PyTorch oracles of its kernels, which is faster here."""
    from vllm_lookahead.core.ops import TorchOps
    from vllm_lookahead.core.tree import DraftTree
    from vllm_lookahead.engine.gpu import attention, model_runner
    from vllm_lookahead.triton_kernels.attention_reference import (
        pack_bits,
        tree_attention_reference,
    )

    def build_mask(
        tree: DraftTree,
        root_position: torch.Tensor,
        query_start_loc: torch.Tensor,
        bits: torch.Tensor,
        positions: torch.Tensor,
        input_ids: torch.Tensor,
    ) -> None:
        bits.copy_(pack_bits(tree.ancestors()))
        for b, size in enumerate(tree.num_nodes.tolist()):
            at = query_start_loc[b] + torch.arange(size)
            positions[at] = (root_position[b] + tree.depths[b, :size]).to(positions)
            input_ids[at] = tree.tokens[b, :size].to(input_ids)

    def tree_attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Any,
        out: torch.Tensor,
        scale: float,
        softcap: float,
        **kwargs: Any,
    ) -> None:
        out[:], _ = tree_attention_reference(
            q,
            k_cache,
            v_cache,
            batch.query_start_loc,
            batch.context_lens,
            batch.block_table,
            batch.ancestor_bits,
            scale,
            softcap=softcap,
        )

    model_runner.TritonOps = lambda *args: TorchOps()
    model_runner.build_mask = build_mask
    attention.tree_attention = tree_attention
