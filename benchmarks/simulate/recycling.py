# SPDX-License-Identifier: Apache-2.0
"""Token Recycling (Luo et al. 2024, "Turning Trash into Treasure").

A row per token keeps the eight tokens that were likeliest when it was last fed,
accepted or not; a static tree of ranks is filled from the rows. Rows begin as zeros,
which are no drafts, and the prompt's own fill the first of them.
"""

from collections.abc import Sequence

from benchmarks.simulate.protocol import Answers, Request, Tree

RANKS = 8
# The template of 80 candidates, a row per depth: how many children the nodes of the
# depth above have, in order (section 3.2, figure 4 of the paper).
TEMPLATE = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)


def template() -> list[tuple[int, ...]]:
    """Ranks on the way to each candidate, the likeliest first."""
    above: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for counts in TEMPLATE:
        above = [
            (*path, rank)
            for path, count in zip(above, counts, strict=False)
            for rank in range(count)
        ]
        paths += above
    # A rank costs as much as a level. A parent costs less than its children.
    return sorted(paths, key=lambda path: len(path) + sum(path))


class Recycling:
    reads_all_nodes = True

    def __init__(self, request: Request) -> None:
        self.root = request.first
        self.rows: dict[int, list[int]] = {}
        self.template = template()
        self._learn(request.prompt, request.prefill)

    def _learn(self, tokens: Sequence[int], answers: Answers) -> None:
        rows = answers.ids[:, :RANKS].tolist()
        self.rows.update(zip(tokens, rows, strict=True))

    def draft(self, budget: int) -> Tree:
        self.tree = Tree.of(self.root)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for path in self.template[: budget - 1]:
            parent = nodes.get(path[:-1])
            if parent is None:
                continue
            row = self.rows.get(self.tree.tokens[parent], [])
            if path[-1] < len(row):
                nodes[path] = self.tree.add(parent, row[path[-1]])
        return self.tree

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        self._learn(self.tree.tokens, answers)
        self.root = answers.sampled[path[-1]]
