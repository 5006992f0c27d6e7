# SPDX-License-Identifier: Apache-2.0
"""What each source of drafts says, how they add up, and which branches are kept."""

import itertools
import math

import pytest
import torch

from tests.core.build import (
    Row,
    candidates,
    make_batch,
    make_hints,
    make_pages,
    put_answers,
    put_in_ring,
    write,
)
from tests.core.equivalence import SHAPES, random_hints, random_state
from tests.core.plain_python import chances_of
from vllm_lookahead.core.draft.estimate import FLOOR, WEIGHTS, Hints
from vllm_lookahead.core.draft.grow import BEAM
from vllm_lookahead.core.draft.noise import cpu_noise, gpu_noise
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE
from vllm_lookahead.numba_kernels.ops import NumbaOps

# After token t the model says t + 1, then t + 2 and t + 3, a nat less likely each.
COUNTING = torch.arange(50)[:, None].int() + torch.tensor([1, 2, 3]).int()
LOGPROBS = torch.tensor([-0.5, -1.5, -2.5]).expand(50, 3).contiguous()
BIGRAMS = {"bigrams": COUNTING, "bigram_logprobs": LOGPROBS}
N = 5

Branches = dict[tuple[int, ...], float]


def drafted(
    ops: LookaheadOps,
    history: list[int],
    root: int,
    ring: tuple = (),
    answers: tuple = (),
    sizes: dict | None = None,
    **given,
) -> Branches:
    """What follows a history and a root, in the order of nodes; G=1 unless told."""
    pages = make_pages(4, 8, 2, N)
    row = Row([2, 0, 3], len(history), root, **{"w": 0, "n": N, "g": 1} | (sizes or {}))
    write(ReferenceOps(), pages, row.blocks, history)
    put_in_ring(pages, 2, ring)
    put_answers(pages, 2, answers)
    return candidates(ops, pages, row, **given)


def answer_score(agreement: int, logprob: float) -> float:
    return WEIGHTS[f"answer{agreement}"] * (logprob - FLOOR)


def bigram_score(logprob: float) -> float:
    return WEIGHTS["bigram"] * (logprob - FLOOR)


def assert_chances(found: Branches, scores: dict[int, float], other: float) -> None:
    """Of the first level, by hand."""
    expected = dict(zip(scores, chances_of([*scores.values()], other), strict=True))
    first = {path[0]: chance for path, chance in found.items() if len(path) == 1}
    assert first == pytest.approx(expected, rel=1e-5)


OTHER = WEIGHTS["other"]
WIDE = {"g": 9, "n": 2}


def test_with_nothing_known_nothing_is_drafted(ops):
    assert drafted(ops, [1, 2], 3) == {}


@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_the_text(ops, agreement):
    history = [7, 8, 9, 5, 6, *[7, 8, 9][-agreement:][:-1]]
    if agreement < 3:  # the rest does not agree
        history.insert(5, 30)
    found = drafted(ops, history, 9, sizes=WIDE)
    assert_chances(found, {5: WEIGHTS[f"text{agreement}"]}, OTHER)


def test_the_ngrams_of_the_window(ops):
    """The key and the token before it are two that may agree."""
    ring = ((7, 9, 21, 22, 23, 24),)
    found = drafted(ops, [40, 7], 9, ring)
    assert list(found) == [(21,), (21, 22), (21, 22, 23), (21, 22, 23, 24)]
    (first,) = chances_of([WEIGHTS["text2"]], OTHER)
    (later,) = chances_of([WEIGHTS["text3"]], OTHER)
    expected = [first * later**k for k in range(4)]
    assert list(found.values()) == pytest.approx(expected)


@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_the_answers(ops, agreement):
    context = [7, 8, 9][-agreement:]
    if agreement < 3:
        context = [30, *context]
    said = {21: -1.0, 22: -2.0, 23: FLOOR, 24: FLOOR - 3}
    found = drafted(ops, [40, 7, 8], 9, answers=((context, said),), sizes=WIDE)
    scores = {21: answer_score(agreement, -1.0), 22: answer_score(agreement, -2.0)}
    # What is less likely than silence says as little.
    assert_chances(found, scores | {23: 0.0, 24: 0.0}, OTHER)


def test_of_answers_the_nearest_and_then_the_newest_is_heard(ops):
    answers = [
        ([8, 9], {21: -1.0}),
        ([8, 9], {22: -1.0}),
        ([9], {23: -1.0}),
        ([9], {24: -1.0}),
    ]
    for count, first in enumerate((21, 22, 22, 22), 1):
        assert list(drafted(ops, [8], 9, answers=answers[:count])) == [(first,)]
    assert list(drafted(ops, [7], 9, answers=answers)) == [(24,)]


def test_the_bigrams(ops):
    found = drafted(ops, [40, 41], 10, sizes=WIDE, **BIGRAMS)
    scores = {10 + k: bigram_score(0.5 - k) for k in (1, 2, 3)}
    assert_chances(found, scores, OTHER)
    # Told of no text at all.
    assert drafted(ops, [], 10, sizes=WIDE, **BIGRAMS) == found


def test_a_token_without_bigrams_ends_a_branch(ops):
    bigrams = COUNTING.clone()
    bigrams[12] = EMPTY
    known = {"bigrams": bigrams, "bigram_logprobs": LOGPROBS}
    assert list(drafted(ops, [40, 41], 10, **known)) == [(11,), (11, 12)]
    assert drafted(ops, [40, 41], 12, **known) == {}
    # Beyond the table.
    assert list(drafted(ops, [40], 49, **known)) == [(50,)]
    assert drafted(ops, [40], 60, **known) == {}


def test_a_token_with_fewer_bigrams(ops):
    bigrams = COUNTING.clone()
    bigrams[10, 1] = EMPTY
    known = {"bigrams": bigrams, "bigram_logprobs": LOGPROBS}
    found = drafted(ops, [40], 10, sizes=WIDE, **known)
    assert_chances(found, {11: bigram_score(-0.5), 13: bigram_score(-2.5)}, OTHER)


def test_the_odds_of_a_token_add_up(ops):
    history = [7, 8, 9, 10, 30, 7, 8]
    answers = (([8, 9], {10: -1.0, 11: -3.0}),)
    found = drafted(ops, history, 9, (), answers, WIDE, **BIGRAMS)
    said = {
        10: [WEIGHTS["text3"], answer_score(2, -1.0), bigram_score(-0.5)],
        11: [answer_score(2, -3.0), bigram_score(-1.5)],
        12: [bigram_score(-2.5)],
    }
    scores = {t: math.log(sum(map(math.exp, each))) for t, each in said.items()}
    assert_chances(found, scores, OTHER)
    assert list(found) == [(10,), (11,), (12,)]


def test_other_weights(ops):
    silent = WEIGHTS | {
        **dict.fromkeys(("text1", "text2", "text3"), 0.0),
        "bigram": 1.0,
        "other": 1.0,
    }
    pages = make_pages(2, 8, 0, 2)
    write(ops, pages, [0], [9, 5])
    hints = make_hints(1, 2, **BIGRAMS)
    batch = make_batch([Row([0], 2, 9, n=2)])
    tree, chances = ops.draft(pages, batch, hints, 4, silent)
    assert tree.tokens[0].tolist() == [9, 10, 11, 12, 5]
    scores = [x - FLOOR for x in (-0.5, -1.5, -2.5)]
    expected = [0.0, *chances_of([*scores, 0.0], 1.0)]
    assert chances[0].tolist() == pytest.approx(expected)


def test_chances_multiply_along_a_branch(ops):
    found = drafted(ops, [40, 41], 10, sizes={"g": 12, "n": 3}, **BIGRAMS)
    shares = chances_of([bigram_score(x) for x in (-0.5, -1.5, -2.5)], OTHER)
    expected = {}
    for i, j in itertools.product(range(3), repeat=2):
        expected[11 + i,] = shares[i]
        expected[11 + i, 12 + i + j] = shares[i] * shares[j]
    assert found == pytest.approx(expected)
    values = list(found.values())
    assert values == sorted(values, reverse=True)


def test_of_equally_likely_branches_the_shorter_comes_first(ops):
    """Also where a chance is so near to 1 that a child's is its parent's."""
    text = [9] * 6
    pages = make_pages(1, 8, 0, N)
    write(ops, pages, [0], text)
    sure = WEIGHTS | dict.fromkeys(("text1", "text2", "text3"), 100.0)
    batch = make_batch([Row([0], 6, 9, n=N, g=2)])
    tree, chances = ops.draft(pages, batch, make_hints(1, N), 2, sure)
    assert tree.parents[0, :N].tolist() == [-1, 0, 1, 2, 3]
    assert chances[0, :N].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", SHAPES)
def test_chances_are_probabilities(ops, name):
    """Children share what is their parent's, and leave some of it to other tokens."""
    for seed in range(3):
        state = random_state(SHAPES[name], seed)
        hints = random_hints(SHAPES[name], state.n, seed)
        tree, chances = ops.draft(state.pages, state.batch, hints, state.g)
        for b, nodes in enumerate(tree.nodes()):
            of = chances[b].tolist()
            share = [0.0] * len(nodes)
            drafted = [i for i, node in enumerate(nodes) if node.kind == CANDIDATE]
            for i in drafted:
                above = of[nodes[i].parent] if nodes[i].parent else 1.0
                assert 0 < of[i] <= above * (1 + 1e-6)
                share[nodes[i].parent] += of[i]
            assert share[0] < 1
            assert all(share[i] <= of[i] * (1 + 1e-6) for i in drafted)
            assert sum(of) == pytest.approx(sum(of[i] for i in drafted))
            falling = [of[i] for i in drafted]
            assert falling == sorted(falling, reverse=True)


def test_noise_decides_between_equals(ops):
    flat = torch.zeros(50, 3)
    for seed in range(12):
        seeds = torch.arange(seed, seed + N - 1)
        found = drafted(
            ops,
            [40, 41],
            10,
            bigrams=COUNTING,
            bigram_logprobs=flat,
            temperature=torch.tensor([0.7]),
            seeds=seeds[None],
        )
        path: list[int] = []
        for depth in range(N - 1):
            successors = COUNTING[[10, *path][-1]].tolist()
            noises = [cpu_noise(int(seeds[depth]), 2 + depth, t) for t in successors]
            path.append(successors[noises.index(max(noises))])
        assert list(found) == [tuple(path[:k]) for k in range(1, N)]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_chances_under_noise(ops, temperature):
    """A hotter sampler listens less to what is likely."""
    seed = 12345
    found = drafted(
        ops,
        [9, 30, 7],
        9,
        sizes=WIDE,
        temperature=torch.tensor([temperature]),
        seeds=torch.full((1, N - 1), seed),
        **BIGRAMS,
    )
    scores = {30: WEIGHTS["text1"]}
    scores |= {9 + k: bigram_score(0.5 - k) for k in (1, 2, 3)}
    t = float(torch.tensor(temperature))
    for token in scores:
        scores[token] += WEIGHTS["noise"] * t * cpu_noise(seed, 3, token)
    assert_chances(found, scores, OTHER + t * WEIGHTS["other by temperature"])


def test_noise_is_that_of_the_request_and_the_depth(ops):
    """Of two requests one is greedy; the other's seeds are its own."""
    flat = {"bigrams": COUNTING, "bigram_logprobs": torch.zeros(50, 3)}
    pages = make_pages(2, 8, 0, 3)
    for block in range(2):
        write(ops, pages, [block], [40, 41])
    batch = make_batch([Row([block], 2, 10, n=3, g=1) for block in range(2)])
    seeds = torch.tensor([[5, 6], [7, 8]])
    hints = make_hints(2, 3, temperature=torch.tensor([0.0, 1.0]), seeds=seeds, **flat)
    tree, _ = ops.draft(pages, batch, hints, 1)
    assert tree.tokens[0].tolist() == [10, 11, 12]
    first = max((11, 12, 13), key=lambda t: cpu_noise(7, 2, t))
    then = max(first + k for k in (1, 2, 3))
    then = max((first + 1, first + 2, then), key=lambda t: cpu_noise(8, 3, t))
    assert tree.tokens[1].tolist() == [10, first, then]


def test_any_noise_is_asked_by_seed_position_and_token():
    asked = set()

    def noise(seed: int, position: int, token: int) -> float:
        asked.add((seed, position, token))
        return gpu_noise(seed, position, token)

    drafted(
        ReferenceOps(),
        [40, 41],
        10,
        noise=noise,
        temperature=torch.ones(1),
        seeds=torch.tensor([[5, 6, 7, 8]]),
        sizes={"n": 3},
        **BIGRAMS,
    )
    at_root = {(5, 2, token) for token in (11, 12, 13)}
    assert at_root < asked
    assert {(seed, at) for seed, at, _ in asked - at_root} == {(6, 3)}


def test_the_cpus_kernel_knows_its_samplers_noise_only():
    with pytest.raises(ValueError, match="CPU only"):
        drafted(NumbaOps(), [1, 2], 3, noise=gpu_noise)


def branches_by_level(levels: int, most: int) -> Branches:
    """Of `BIGRAMS` after 10, level by level."""
    shares = chances_of([bigram_score(x) for x in (-0.5, -1.5, -2.5)], OTHER)
    level: Branches = {(): 1.0}
    kept: Branches = {}
    for _ in range(levels):
        parents = sorted(level, key=lambda path: -level[path])[:BEAM]
        children = {
            (*path, (path[-1] if path else 10) + k): level[path] * shares[k - 1]
            for path in parents
            for k in (1, 2, 3)
        }
        ranked = sorted(children, key=lambda path: -children[path])
        level = {path: children[path] for path in ranked[:most]}
        kept |= level
    return kept


@pytest.mark.parametrize("most", [0, 1, 2, 3, 8, 12, 30])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_level_keeps_its_likeliest_and_a_beam_of_them_has_children(ops, n, most):
    found = drafted(ops, [40, 41], 10, sizes={"n": n, "g": most}, **BIGRAMS)
    expected = branches_by_level(n - 1, most)
    # Paths of the same steps in another order are equally likely.
    values = sorted(expected.values(), reverse=True)
    assert list(found.values()) == pytest.approx(values)
    for depth in range(1, n):
        level = [path for path in found if len(path) == depth]
        assert len(level) == len([path for path in expected if len(path) == depth])
        assert len(level) <= most
        parents = {path[:-1] for path in level}
        assert len(parents) <= BEAM
        assert parents <= {(), *found}


def test_only_the_likeliest_of_a_level_have_children(ops):
    successors = torch.arange(11, 31, dtype=torch.int32)
    bigrams = torch.full((50, 20), EMPTY, dtype=torch.int32)
    logprobs = torch.zeros(50, 20)
    bigrams[10], logprobs[10] = successors, -0.1 * torch.arange(20)
    bigrams[11:31, 0] = 40
    known = {"bigrams": bigrams, "bigram_logprobs": logprobs}
    found = drafted(ops, [41], 10, sizes={"g": 20, "n": 3}, **known)
    assert {path[0] for path in found if len(path) == 1} == set(range(11, 31))
    assert {path[0] for path in found if len(path) == 2} == set(range(11, 11 + BEAM))


@pytest.mark.parametrize("least", [0.01, 0.02, 0.1, 0.4, 1.0])
def test_the_least_chance(ops, least):
    """Likelier branches are all there, and as they were."""
    sizes = {"g": 12}
    whole = drafted(ops, [40, 41], 10, sizes=sizes, **BIGRAMS)
    likely = {path: x for path, x in whole.items() if x >= least}
    found = drafted(ops, [40, 41], 10, sizes=sizes, least=least, **BIGRAMS)
    assert list(found.items()) == list(likely.items())
    assert len(whole) == 3 + 9 + 12 + 12 and len(likely) < len(whole)


@pytest.mark.parametrize("name", ["small", "tree of 120", "N = 16", "no window"])
def test_the_least_chance_of_random_trees(ops, name):
    state = random_state(SHAPES[name], seed=1)
    hints: Hints = random_hints(SHAPES[name], state.n, seed=0)
    state.batch.window_size[:] = 0
    tree, chances = ops.draft(state.pages, state.batch, hints, state.g)
    hints.least = 1.001 * float(chances[chances > 0].median())
    less, own_chances = ops.draft(state.pages, state.batch, hints, state.g)
    assert (less.num_nodes < tree.num_nodes).any()
    for b, (nodes, kept) in enumerate(zip(tree.nodes(), less.nodes(), strict=True)):
        assert kept == nodes[: 1 + int((chances[b] >= hints.least).sum())]
        assert torch.equal(own_chances[b, : len(kept)], chances[b, : len(kept)])


def test_other_tensors_are_refused():
    pages, batch = make_pages(1, 8, 0, N), make_batch([Row([0], 1, 2)])
    for name in ("temperature", "bigram_logprobs"):
        hints = make_hints(1, N)
        setattr(hints, name, getattr(hints, name).double())
        with pytest.raises(TypeError, match=r"expected torch.float32"):
            NumbaOps.draft(pages, batch, hints, 4)
