# SPDX-License-Identifier: Apache-2.0
"""Sample and match: which drafted tokens the model says itself.

Walk from the root; while some candidate child carries the token sampled at the
current node, step into it. Every token on the way was sampled from the model's
true conditional, so the output is the model's for any sampler; the last one has
no node of its own and is the bonus token.
"""

from dataclasses import dataclass

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, DraftTree


@dataclass
class Verdict:
    """Outcome of a step for B requests.

    Attributes:
        tokens: [B, N] int32, the tokens emitted, EMPTY beyond `num_emitted`.
        path: [B, N] int32, node each of them was sampled at, the root first;
            EMPTY beyond `num_emitted`.
        num_emitted: [B] int32, the acceptance length, 1..N.
    """

    tokens: torch.Tensor
    path: torch.Tensor
    num_emitted: torch.Tensor


def verify(tree: DraftTree, sampled: torch.Tensor, max_emitted: int) -> Verdict:
    """Walk every tree at once.

    Args:
        tree: siblings carry distinct tokens (`build_tree` merges equal ones).
        sampled: [B, T] integers, the token sampled at each node; only the root's
            and the candidates' are read.
        max_emitted: N, columns of the result.
    """
    sampled = sampled.to(torch.int32)
    parent = tree.parents.clamp(min=0).long()
    matches = (tree.kinds == CANDIDATE) & (tree.tokens == sampled.gather(1, parent))
    # On the path: the root, and a match whose parent is on the path.
    accepted = torch.zeros_like(matches)
    accepted[:, 0] = True
    for _ in range(max_emitted - 1):
        accepted |= matches & accepted.gather(1, parent)

    size = tree.tokens.shape[1]
    node = torch.arange(size, dtype=torch.int32, device=parent.device)
    depth = tree.depths.long().where(accepted, max_emitted)  # one spare column
    path = sampled.new_full((sampled.shape[0], max_emitted + 1), EMPTY)
    path.scatter_(1, depth, node.expand(depth.shape))
    path = path[:, :max_emitted]
    tokens = sampled.gather(1, path.clamp(min=0).long()).where(path >= 0, EMPTY)
    return Verdict(tokens, path, (path >= 0).sum(1, dtype=torch.int32))


def accepted_moves(
    batch: RequestBatch, verdict: Verdict, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that the accepted nodes' K/V must move from and to.

    Node i lies in the slot of position p+i; accepted at depth d it belongs in
    that of p+d. A node never lies below its target, and paths ascend, so a move
    is safe in place when each reads before it writes.

    Returns:
        src, dst: [B, N-1] int64 physical slots, -1 beyond the accepted ones.
    """
    node = verdict.path[:, 1:].long()
    position = batch.position[:, None].long()
    depth = torch.arange(1, node.shape[1] + 1, device=node.device)
    at = position + node
    to = (position + depth).where(node >= 0, EMPTY)
    src = batch.slots(at.where(node >= 0, EMPTY), block_size)
    return src, batch.slots(to, block_size)


def move_slots(
    caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor
) -> None:
    """Move K/V between slots, in place, in every cache.

    Args:
        caches: views of shape [num_blocks, block_size, ...], any strides.
        src, dst: [n] int64 physical slots.
    """
    for cache in caches:
        size = cache.shape[1]
        cache[dst // size, dst % size] = cache[src // size, src % size]
