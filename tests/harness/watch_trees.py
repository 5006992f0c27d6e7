# SPDX-License-Identifier: Apache-2.0
"""Has an engine on the V1 runner draft all that it can, and counts the trees."""

from dataclasses import replace
from typing import Any

from vllm_lookahead.core.tree import CANDIDATE, DraftTree


class WatchedTrees:
    """Of a runner, from now on, whatever its nodes cost.

    Attributes:
        trees: with candidates.
        branched: of these, trees that offer several tokens at one place.
        merged: of these, trees that do so below the root: some branches begin with the
            same tokens.
    """

    def __init__(self, runner: Any) -> None:
        self.trees = self.branched = self.merged = 0
        draft = runner.ops.draft

        def watched(pages: Any, batch: Any, hints: Any, most: int, **kept: Any) -> Any:
            hints = replace(hints, least=0.0)
            tree, chances = draft(pages, batch, hints, most, **kept)
            self.count(tree)
            return tree, chances

        runner.ops.draft = watched

    def count(self, tree: DraftTree) -> None:
        parents, kinds = tree.parents.tolist(), tree.kinds.tolist()
        for b, size in enumerate(tree.num_nodes.tolist()):
            nodes = [i for i in range(size) if kinds[b][i] == CANDIDATE]
            above = [parents[b][i] for i in nodes]
            below = [parent for parent in above if parent > 0]
            self.trees += bool(nodes)
            self.branched += len(set(above)) < len(above)
            self.merged += len(set(below)) < len(below)
