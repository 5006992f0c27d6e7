# SPDX-License-Identifier: Apache-2.0
"""Filing what is new each step finds what filing everything finds."""

import pytest

from tests.core.equivalence import Shape, random_hints, random_state, run_steps
from vllm_lookahead.core.pages import CONTEXT, EMPTY
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.numba_kernels.tables import Tables


class KeepingOps(NumbaOps):
    """Numba's, on tables that last from step to step."""

    def __init__(self) -> None:
        self.tables = Tables()

    def draft(self, pages, batch, hints, max_candidates):  # type: ignore[override]
        rows = range(len(batch.root))
        self.tables.choose(rows, pages, batch.block_table.shape[1])
        return NumbaOps.draft(pages, batch, hints, max_candidates, tables=self.tables)


def trees_of(ops: NumbaOps, shape: Shape, seed: int):
    return [
        tree.nodes()
        for tree, _ in run_steps(ops, random_state(shape, seed), shape, seed)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 5, 4, vocab=100_000),
        Shape(0, 5, 4, vocab=2000, holes=True),
        Shape(0, 5, 4, vocab=2000, block_size=128, num_blocks=2),
        Shape(4, 5, 4, vocab=5),  # n-grams of a window: all is filed anew
    ],
    ids=["no collisions", "holes", "long blocks", "window"],
)
def test_the_same_is_drafted(shape: Shape, seed: int) -> None:
    assert trees_of(KeepingOps(), shape, seed) == trees_of(NumbaOps(), shape, seed)


def test_little_is_lost_where_every_context_was_answered_before() -> None:
    """An answer that is gone may have taken the cell of one that is still there."""
    shape, same, count = Shape(0, 5, 8, vocab=12, num_blocks=20), 0, 0
    for seed in range(5):
        for own, all_filed in zip(
            trees_of(KeepingOps(), shape, seed),
            trees_of(NumbaOps(), shape, seed),
            strict=True,
        ):
            same += sum(a == b for a, b in zip(own, all_filed, strict=True))
            count += len(own)
    assert 0.6 * count < same


def test_a_step_files_only_what_is_new() -> None:
    shape, ops = Shape(0, 5, 4, vocab=2000, same_sizes=True), KeepingOps()
    state = random_state(shape, 0)
    ops.draft(state.pages, state.batch, random_hints(shape, state.n, 0), state.g)
    assert ops.tables.filed[:3, 0].tolist() == state.batch.position.tolist()
    ops.tables.text[:] = EMPTY
    ops.draft(state.pages, state.batch, random_hints(shape, state.n, 0), state.g)
    assert (ops.tables.text == EMPTY).all()
    state.batch.position = state.batch.position + 1
    ops.draft(state.pages, state.batch, random_hints(shape, state.n, 0), state.g)
    assert ((ops.tables.text != EMPTY).sum(1) <= CONTEXT).all()
    assert (ops.tables.text != EMPTY).any()


def test_a_page_that_lost_its_tokens_is_not_drafted_from() -> None:
    shape, ops = Shape(0, 5, 4, vocab=30, same_sizes=True), KeepingOps()
    state = random_state(shape, 0)
    hints = random_hints(shape, state.n, 0)
    hints.bigrams, state.pages.answer_count[:] = hints.bigrams[:0], 0
    before, _ = ops.draft(state.pages, state.batch, hints, state.g)
    assert (before.num_nodes > 1).any()
    state.pages.tokens[:, 1::2] = EMPTY
    tree, _ = ops.draft(state.pages, state.batch, hints, state.g)
    for b, size in enumerate(tree.num_nodes.tolist()):
        assert (tree.tokens[b, :size] != EMPTY).all()


def test_a_row_is_used_again_and_starts_empty() -> None:
    pages = random_state(Shape(0, 5, 4), 0).pages
    tables = Tables()
    tables.choose("abc", pages, 4)
    assert sorted(tables.rows) == [0, 1, 2]
    row = int(tables.rows[1])
    tables.filed[:] = 7
    tables.remove("b")
    tables.remove("nobody")
    tables.choose("cd", pages, 4)
    assert tables.rows[1] == row
    assert tables.filed[tables.rows].tolist() == [[7] * 3, [0] * 3]


def test_tables_grow_and_are_filled_anew() -> None:
    pages, tables = random_state(Shape(0, 5, 4), 0).pages, Tables()
    tables.choose("a", pages, 4)
    before = tables.text.shape[1]
    tables.filed[:] = 7
    tables.choose("a", pages, 400)
    assert tables.text.shape[1] > before
    assert not tables.filed.any()
    tables.filed[:] = 7
    tables.choose("ab", pages, 4)  # for one more; none the smaller
    assert tables.text.shape == (2, tables.text.shape[1])
    assert tables.text.shape[1] > before
    assert not tables.filed.any()
