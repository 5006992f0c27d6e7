# SPDX-License-Identifier: Apache-2.0
"""How many nodes each tree of a step may have. Imports nothing from vLLM."""

from collections.abc import Sequence


def tree_share(sizes: Sequence[int], budget: int) -> int:
    """The most nodes of a tree, so that all of them together fit a budget.

    What small trees leave goes to larger ones.

    Args:
        sizes: T of each request that drafts, at least one.
        budget: tokens.
    """
    count = len(sizes)
    share = budget // count
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
