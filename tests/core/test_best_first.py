# SPDX-License-Identifier: Apache-2.0
"""Trees grown best first: what each source of guesses does, and Numba's equality."""

import math

import pytest
import torch

from tests.core.build import Row, make_batch, make_pages, put_in_ring, write
from tests.core.equivalence import SHAPES, Shape, assert_same_trees, random_state
from vllm_lookahead.core.draft.best_first import MAX_SEEN, WEIGHTS, Hints, Rejected
from vllm_lookahead.core.draft.noise import gumbel_noise
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE
from vllm_lookahead.numba_kernels.ops import NumbaOps

# After token t the model says t + 1, then t + 2 and t + 3, a logit less each.
COUNTING = torch.arange(50)[:, None].int() + torch.tensor([1, 2, 3]).int()
LOGITS = torch.tensor([5.0, 4.0, 3.0]).log_softmax(0).expand(50, 3).contiguous()
N = 5


@pytest.fixture(params=[ReferenceOps, NumbaOps], ids=["reference", "numba"])
def grow(request):
    return request.param.grow


def make_hints(num_requests=1, n=N, **given) -> Hints:
    values = {
        "bigrams": torch.zeros(0, 0, dtype=torch.int32),
        "bigram_logits": torch.zeros(0, 0),
        "temperature": torch.zeros(num_requests),
        "seeds": torch.zeros(num_requests, n - 1, dtype=torch.int64),
        "rejected": Rejected.none(num_requests),
    }
    return Hints(**values | given)


def counting(**given) -> Hints:
    return make_hints(bigrams=COUNTING, bigram_logits=LOGITS, **given)


def grown(grow, history, root, hints, least=1e-3, w=0, ring=(), **sizes):
    """(token, parent) of each candidate, and the number expected to be accepted."""
    pages = make_pages(4, 8, w, N)
    row = Row([2, 0, 3], len(history), root, **{"w": 0, "n": N, "g": 1} | sizes)
    write(ReferenceOps(), pages, row.blocks, history)
    if ring:
        put_in_ring(pages, 2, ring)
    tree, expected = grow(pages, make_batch([row]), hints, least)
    (nodes,) = tree.nodes()
    for node in nodes[1:]:
        assert node.kind == CANDIDATE
        assert node.depth == nodes[node.parent].depth + 1
    return [(node.token, node.parent) for node in nodes[1:]], float(expected[0])


def test_with_nothing_known_nothing_is_drafted(grow):
    assert grown(grow, [1, 2], 3, make_hints()) == ([], 0.0)


def test_the_model_alone_counts_on(grow):
    chain, expected = grown(grow, [40, 41], 10, counting())
    assert chain == [(11, 0), (12, 1), (13, 2), (14, 3)]
    scale = WEIGHTS["bigram"]
    logits = [scale * float(x) for x in LOGITS[0]]
    # Any other token is one more, with logit 0 as nothing is sampled.
    chance = math.exp(logits[0]) / (1 + sum(map(math.exp, logits)))
    assert expected == pytest.approx(sum(chance**k for k in (1, 2, 3, 4)))


def test_branches_come_in_falling_order_of_their_chance(grow):
    scale = WEIGHTS["bigram"]
    one, two, three = (math.exp(scale * float(x)) for x in LOGITS[0])
    total, least = 1 + one + two + three, 0.03
    nodes, _ = grown(grow, [40, 41], 10, counting(), least=least, g=8)
    chance = {(): 1.0}
    for token, parent in nodes:
        path = next(p for i, p in enumerate(chance) if i == parent)
        last = path[-1] if path else 10
        chance[*path, token] = chance[path] * (one, two, three)[token - last - 1]
        chance[*path, token] /= total
    found = list(chance.values())
    assert found == pytest.approx(sorted(found, reverse=True)) and found[-1] >= least
    # Every path that is likely enough is there.
    expected, frontier = {()}, [((), 1.0)]
    while frontier:
        path, p = frontier.pop()
        for step, x in enumerate((one, two, three), 1):
            longer = *path, (path[-1] if path else 10) + step
            if p * x / total >= least and len(longer) < N:
                expected.add(longer)
                frontier.append((longer, p * x / total))
    assert set(chance) == expected and len(expected) > 8


@pytest.mark.parametrize("leaves", [0, 1, 2, 5])
def test_leaves_depth_and_nodes_are_bounded(grow, leaves):
    nodes, _ = grown(grow, [40, 41], 10, counting(), g=leaves, n=4)
    parents = {parent for _, parent in nodes}
    assert sum(i not in parents for i in range(1, len(nodes) + 1)) == leaves
    assert len(nodes) <= leaves * 3
    few, _ = grown(grow, [40, 41], 10, counting(), g=leaves, n=4, max_nodes=3)
    assert few == nodes[:2]


def test_what_was_seen_is_weighed_with_the_model(grow):
    # 9 followed 5 once, 6 is the model's favourite.
    assert grown(grow, [40, 5, 9, 41], 5, counting())[0][0] == (9, 0)
    # The model's favourite was seen too.
    assert grown(grow, [5, 9, 5, 6, 41], 5, counting())[0][0] == (6, 0)


def test_agreement_and_then_recency_decide(grow):
    hints = make_hints()
    history = [1, 2, 7, 1, 3, 8, 2, 3, 9, 1]
    # 3 came after 1 and after 2; the last before the root is 1.
    assert grown(grow, history, 3, hints)[0][0] == (8, 0)
    # 1 agrees nowhere: the latest.
    assert grown(grow, [5, 8, 6, 5, 9, 7], 5, hints)[0][0] == (9, 0)
    # Agreement goes on along the draft: 4, 5 was followed by 6, not by 7.
    history = [4, 5, 6, 1, 5, 7, 5, 7, 3]
    assert grown(grow, history, 4, hints)[0][:2] == [(5, 0), (6, 1)]


def test_the_root_ends_the_history(grow):
    """5 was followed by the root itself, which was followed by nothing."""
    assert grown(grow, [40, 5], 9, make_hints())[0] == []
    assert grown(grow, [5], 5, make_hints())[0] == [(5, i) for i in range(4)]


def test_entries_of_the_window_are_followed_inside(grow):
    ring = [(7, 5, 21, 22, 23, 24)]
    chain, _ = grown(grow, [40, 7], 5, make_hints(), w=2, ring=ring)
    assert [token for token, _ in chain] == [21, 22, 23, 24]


def rejected(token, depth, logits, dtype=torch.float32) -> Rejected:
    tokens = torch.tensor([[EMPTY, token]], dtype=torch.int32)
    depths = torch.tensor([[0, depth]], dtype=torch.int32)
    rows = torch.tensor([[0, 1]])
    logits = torch.stack([torch.full_like(logits, torch.nan), logits])
    return Rejected(tokens, depths, rows, logits.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [0, 2])
def test_the_answer_at_a_rejected_node_is_heard(grow, depth, dtype):
    """It was asked after 30, at the place of the node that precedes the choice."""
    logits = torch.zeros(50)
    root = 10
    preferred = root + depth + 2  # the model's second choice there
    logits[preferred] = 8.0
    hints = counting(rejected=rejected(30, depth, logits, dtype))
    chain, _ = grown(grow, [40, 41], root, hints)
    usual = list(range(root + 1, root + 1 + depth))
    assert [token for token, _ in chain][: depth + 1] == [*usual, preferred]


def test_what_is_usual_after_the_rejected_token_says_nothing(grow):
    """12 is no surprise after 10, which was rejected: it is after 11, too."""
    usual = torch.full((50,), 3.0)
    usual[[11, 12, 13]] = torch.tensor([5.0, 4.0, 3.0])
    plain, chance = grown(grow, [40, 41], 10, counting(), n=2)
    told = counting(rejected=rejected(10, 0, usual))
    same, also = grown(grow, [40, 41], 10, told, n=2)
    assert same == plain and also == pytest.approx(chance)


def test_a_rejected_node_of_the_same_token_is_preferred(grow):
    tokens = torch.tensor([[30, 10]], dtype=torch.int32)
    logits = torch.zeros(2, 50)
    logits[0, 12], logits[1, 13] = 20.0, 20.0
    depths = torch.zeros(1, 2, dtype=torch.int32)
    nodes = Rejected(tokens, depths, torch.tensor([[0, 1]]), logits)
    assert grown(grow, [40, 41], 10, counting(rejected=nodes))[0][0] == (13, 0)


def test_noise_decides_between_equals(grow):
    flat = torch.zeros(50, 3)
    for seed in range(12):
        hints = make_hints(
            bigrams=COUNTING,
            bigram_logits=flat,
            temperature=torch.tensor([0.7]),
            seeds=torch.arange(seed, seed + N - 1)[None],
        )
        chain, _ = grown(grow, [40, 41], 10, hints)
        token, expected = 10, []
        for depth in range(N - 1):
            noise = gumbel_noise(hints.seeds[0, depth], COUNTING[token])
            token = int(COUNTING[token, noise.argmax()])
            expected.append(token)
        assert [token for token, _ in chain] == expected


def test_of_many_seen_those_that_agree_are_kept(grow):
    """The oldest of more followers than there is room for agrees with the suffix."""
    history = [1, 2, 3, 4, 9, 20]
    for i in range(MAX_SEEN + 3):
        history += [9, 21 + i]
    history += [1, 2, 3, 4]
    pages = make_pages(12, 8, 0, N)
    blocks = list(range(10))
    write(ReferenceOps(), pages, blocks, history)
    batch = make_batch([Row(blocks, len(history), 9, n=2, g=1)])
    tree, _ = grow(pages, batch, make_hints(), 1e-3)
    assert tree.nodes()[0][1].token == 20


def random_hints(shape: Shape, n: int, seed: int, dtype: torch.dtype) -> Hints:
    g = torch.Generator().manual_seed(seed)
    b, vocab, rows = shape.batch, min(shape.vocab, 60), 9

    def some(low: int, high: int, *dims: int) -> torch.Tensor:
        return torch.randint(low, high, dims, generator=g)

    ranked = [torch.randperm(vocab, generator=g)[:4] for _ in range(vocab)]
    bigrams = torch.stack(ranked).int()
    bigrams[torch.rand(vocab, generator=g) < 0.15] = EMPTY
    temperature = torch.rand(b, generator=g)
    temperature[::3] = 0
    nodes = Rejected(
        some(-1, shape.vocab, b, 7).int(),
        some(0, n, b, 7).int(),
        some(0, rows, b, 7),
        torch.randn(rows, max(1, vocab - 1), generator=g).to(dtype),
    )
    logits = 3 * torch.randn(bigrams.shape, generator=g)
    return Hints(
        bigrams,
        logits.sort(descending=True).values.log_softmax(-1),
        temperature,
        some(0, 2**31, b, n - 1),
        nodes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_numba_grows_the_same_trees(name, dtype):
    shape = SHAPES[name]
    for seed, least in enumerate((0.001, 0.02, 0.2)):
        state = random_state(shape, seed)
        hints = random_hints(shape, state.n, seed, dtype)
        for given in (hints, make_hints(shape.batch, state.n)):
            arguments = state.pages, state.batch, given, least
            tree, expected = ReferenceOps.grow(*arguments)
            again, as_expected = NumbaOps.grow(*arguments)
            assert_same_trees(tree, again)
            torch.testing.assert_close(as_expected, expected, rtol=1e-9, atol=0)


def test_other_tensors_are_refused():
    state = random_state(SHAPES["small"], seed=0)
    hints = make_hints(3, state.n)
    hints.temperature = hints.temperature.double()
    with pytest.raises(TypeError, match=r"expected torch.float32, got torch.float64"):
        NumbaOps.grow(state.pages, state.batch, hints, 0.1)
