# SPDX-License-Identifier: Apache-2.0
"""How many nodes each tree of a step is fed. Imports nothing from vLLM."""

from bisect import bisect_left
from collections.abc import Sequence

# Tokens that all trees of a step share, and at least the server's widest tree; more
# requests, smaller trees. By bytes and operations a 7B model in bf16 is memory-bound on
# an H200 up to about 180 tokens; nothing was measured.
MAX_TREE_TOKENS = 256
# The number of trees in a step is rounded up to one of these before they share its
# tokens, at most by a quarter: each has a CUDA graph of its own.
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
COUNTS += [80, 96, 112, 128, 160, 192, 224, 256]


def tree_budget(widest: int, max_num_tokens: int) -> int:
    """Tokens that the trees of a step share: enough for one whole tree, if any is.

    Args:
        widest: T of the server.
        max_num_tokens: of a step.
    """
    return min(max(MAX_TREE_TOKENS, widest), max_num_tokens)


def tree_share(sizes: Sequence[int], budget: int) -> int:
    """The most nodes of a tree, so that all of them together fit a budget.

    What small trees leave goes to larger ones.

    Args:
        sizes: T of each request that drafts, at least one.
        budget: tokens.
    """
    count = len(sizes)
    known = bisect_left(COUNTS, count)
    share = budget // (COUNTS[known] if known < len(COUNTS) else count)
    for size in sorted(sizes):
        count -= 1
        if size > share or not count:
            break
        budget -= size
        share = budget // count
    return max(1, share)


def nodes_within(tree: int, verified: int, most: int) -> int:
    """Nodes of a tree that there is room for; a window fits whole or is left out.

    Args:
        tree: T.
        verified: the root and the candidates among them.
        most: what there is room for.
    """
    return tree if tree <= most else max(1, min(verified, most))
