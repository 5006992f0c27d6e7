# SPDX-License-Identifier: Apache-2.0
"""Counts the draft trees of an engine on the V1 runner."""

from typing import Any

from vllm_lookahead.core.tree import CANDIDATE, DraftTree


class WatchedTrees:
    """Of a runner, from now on.

    Attributes:
        trees: with candidates.
        merged: of these, trees whose candidates begin with the same tokens.
    """

    def __init__(self, runner: Any) -> None:
        self.trees = self.merged = 0
        propose = runner.ops.propose

        def watched(*args: Any, **kwargs: Any) -> DraftTree:
            tree = propose(*args, **kwargs)
            self.count(tree)
            return tree

        runner.ops.propose = watched

    def count(self, tree: DraftTree) -> None:
        parents, kinds = tree.parents.tolist(), tree.kinds.tolist()
        for b, size in enumerate(tree.num_nodes.tolist()):
            nodes = [i for i in range(size) if kinds[b][i] == CANDIDATE]
            below = [parents[b][i] for i in nodes if parents[b][i] > 0]
            self.trees += bool(nodes)
            self.merged += len(set(below)) < len(below)
