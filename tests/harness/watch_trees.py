# SPDX-License-Identifier: Apache-2.0
"""Counts the draft trees of an engine on the V1 runner."""

from typing import Any

from vllm_lookahead.core.tree import CANDIDATE, DraftTree


class WatchedTrees:
    """Of a runner, from now on.

    Attributes:
        trees: with candidates.
        branched: of these, trees that offer several tokens at one place.
        merged: of these, trees that do so below the root: their candidates begin with
            the same tokens.
    """

    def __init__(self, runner: Any) -> None:
        self.trees = self.branched = self.merged = 0
        grow = runner.ops.grow

        def watched(*args: Any, **kwargs: Any) -> Any:
            tree, expected = grow(*args, **kwargs)
            self.count(tree)
            return tree, expected

        runner.ops.grow = watched

    def count(self, tree: DraftTree) -> None:
        parents, kinds = tree.parents.tolist(), tree.kinds.tolist()
        for b, size in enumerate(tree.num_nodes.tolist()):
            nodes = [i for i in range(size) if kinds[b][i] == CANDIDATE]
            above = [parents[b][i] for i in nodes]
            below = [parent for parent in above if parent > 0]
            self.trees += bool(nodes)
            self.branched += len(set(above)) < len(above)
            self.merged += len(set(below)) < len(below)
