# SPDX-License-Identifier: Apache-2.0
"""Chains from the model's bigrams, against a definition in plain Python."""

import pytest
import torch

from tests.core.build import Row, full_length, make_batch, make_pages, write
from tests.core.equivalence import (
    SHAPES,
    assert_same_trees,
    random_bigrams,
    random_state,
)
from vllm_lookahead.core.bigrams import (
    NUM_SUCCESSORS,
    Draws,
    complete,
    gumbel_noise,
    model_bigrams,
)
from vllm_lookahead.core.ops import TorchOps
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.pool import BIGRAM, lookup
from vllm_lookahead.cpu_kernels.ops import NumbaOps

# After token t the model says t + 1, then t + 2 and t + 3.
COUNTING = torch.arange(50)[:, None].int() + torch.tensor([1, 2, 3]).int()


def proposed(ops, history, root, bigrams, lengths=None, **sizes):
    """(token, parent, origin) of each candidate node; W=0, N=4, G=3."""
    g, n = 3, 4
    pages = make_pages(4, 8, 0, n)
    row = Row([2, 0, 3], len(history), root, w=0, n=n, g=sizes.get("g", g))
    row.n = sizes.get("n", n)
    batch = make_batch([row])
    write(ops, pages, row.blocks, history)
    lengths = full_length(g, n) if lengths is None else lengths
    tree = ops.propose(pages, batch, lengths, bigrams)
    size = int(tree.num_nodes[0])
    columns = tree.tokens, tree.parents, tree.origins
    return list(zip(*(c[0, 1:size].tolist() for c in columns), strict=True))


def origin(context: int, rank: int) -> int:
    return context * 3 + rank


def test_an_empty_pool_gives_the_successors_of_the_root(ops):
    chains = proposed(ops, [40, 41], 10, COUNTING)
    assert chains == [
        (11, 0, origin(BIGRAM, 0)),
        (12, 1, origin(BIGRAM, 0)),
        (13, 2, origin(BIGRAM, 0)),
        (12, 0, origin(BIGRAM, 1)),
        (13, 4, origin(BIGRAM, 1)),
        (14, 5, origin(BIGRAM, 1)),
        (13, 0, origin(BIGRAM, 2)),
        (14, 7, origin(BIGRAM, 2)),
        (15, 8, origin(BIGRAM, 2)),
    ]


def test_what_the_pool_knows_comes_first_and_goes_on(ops):
    # 5 was followed by 9 and then by the root itself.
    chains = proposed(ops, [40, 5, 9], 5, COUNTING, g=1)
    assert chains == [
        (9, 0, origin(0, 0)),
        (5, 1, origin(0, 0)),
        (6, 2, origin(0, 0)),
    ]


def test_a_token_without_successors_ends_a_chain(ops):
    bigrams = COUNTING.clone()
    bigrams[12] = EMPTY
    chains = proposed(ops, [40, 41], 10, bigrams, g=1)
    assert [token for token, _, _ in chains] == [11, 12]
    assert proposed(ops, [40, 41], 12, bigrams, g=1) == []
    # beyond the table
    assert [t for t, _, _ in proposed(ops, [40], 49, COUNTING, g=1)] == [50]
    assert proposed(ops, [40], 60, COUNTING, g=1) == []


def test_lengths_are_learned_for_bigrams_too(ops):
    lengths = full_length(3, 4)
    lengths[BIGRAM] = torch.tensor([2, 0, 1])
    chains = proposed(ops, [40, 41], 10, COUNTING, lengths)
    assert [token for token, _, _ in chains] == [11, 12, 13]
    lengths[0] = torch.tensor([1, 0, 0])  # a chain from the pool is not lengthened
    assert len(proposed(ops, [40, 5, 9], 5, COUNTING, lengths, g=1)) == 1


def test_a_request_gets_what_it_asks_for(ops):
    assert proposed(ops, [40, 41], 10, COUNTING, g=0) == []
    assert len(proposed(ops, [40, 41], 10, COUNTING, g=2, n=2)) == 2


def plain(chains, contexts, root, g, n, lengths, bigrams):
    """`complete` of one request: {rank: (context, chain)}."""

    def successor(token: int, nth: int = 0) -> int:
        return int(bigrams[token, nth]) if 0 <= token < len(bigrams) else EMPTY

    found = sum(c >= 0 for c in contexts)
    out = {}
    for rank, (chain, context) in enumerate(zip(chains, contexts, strict=True)):
        chain = [token for token in chain if token != EMPTY]
        nth = rank - found
        if nth >= 0:
            if rank >= g or nth >= bigrams.shape[1]:
                continue
            context = BIGRAM
        wanted = min(int(lengths[context, rank]), n - 1)
        while len(chain) < wanted:
            token = successor(chain[-1]) if chain else successor(root, max(nth, 0))
            if token == EMPTY:
                break
            chain.append(token)
        out[rank] = context, chain
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_plain_python_agrees(name):
    state = random_state(SHAPES[name], seed=5)
    bigrams = random_bigrams(SHAPES[name].vocab)
    batch = state.batch
    chains, contexts = lookup(state.pages, batch, state.chain_length)
    after, context = complete(chains, contexts, batch, state.chain_length, bigrams)
    for b in range(len(batch.root)):
        expected = plain(
            chains[b].tolist(),
            contexts[b].tolist(),
            int(batch.root[b]),
            int(batch.verification_set_size[b]),
            int(batch.ngram_size[b]),
            state.chain_length,
            bigrams,
        )
        found = {
            rank: (int(context[b, rank]), [t for t in chain.tolist() if t != EMPTY])
            for rank, chain in enumerate(after[b])
            if context[b, rank] != EMPTY
        }
        assert found == expected


def test_the_model_is_asked_in_chunks_for_the_first_tokens():
    asked = []

    def likeliest(tokens):
        asked.append(tokens.tolist())
        ids = tokens[:, None] + torch.arange(NUM_SUCCESSORS)
        return -ids / 2, ids

    bigrams, logits = model_bigrams(likeliest, vocab_size=10, limit=5, chunk=2)
    assert asked == [[0, 1], [2, 3], [4]]
    assert bigrams.dtype == torch.int32 and bigrams.shape == (10, NUM_SUCCESSORS)
    assert bigrams[4, :4].tolist() == [4, 5, 6, 7]
    assert logits[4, :4].tolist() == [-2, -2.5, -3, -3.5]
    assert (bigrams[5:] == EMPTY).all()


def some_draws(batch, bigrams, depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_requests = len(batch.root)
    temperature = torch.rand(num_requests, generator=generator) + 0.2
    temperature[::3] = 0.0
    return Draws(
        torch.randint(2**31, (num_requests, depth), generator=generator),
        temperature,
        3 * torch.randn(bigrams.shape, generator=generator),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_noise_ranks_the_successors(name):
    """In Numba as in the oracle; a greedy request's are ranked as without noise."""
    state = random_state(SHAPES[name], seed=6)
    bigrams = random_bigrams(SHAPES[name].vocab)
    batch, lengths = state.batch, state.chain_length
    draws = some_draws(batch, bigrams, state.n - 1)
    tree = TorchOps.propose(state.pages, batch, lengths, bigrams, draws)
    assert_same_trees(
        NumbaOps.propose(state.pages, batch, lengths, bigrams, draws), tree
    )
    without = TorchOps.propose(state.pages, batch, lengths, bigrams)
    greedy = draws.temperature == 0
    assert torch.equal(tree.tokens[greedy], without.tokens[greedy])


def test_the_token_that_the_sampler_would_pick_comes_first():
    """If the model says after any history what it says after the last token."""
    torch.manual_seed(0)
    vocab_size, n = 12, 5
    bigrams = torch.stack([torch.randperm(vocab_size) for _ in range(vocab_size)]).int()
    logits = torch.randn(vocab_size, vocab_size).sort(descending=True).values
    table = torch.zeros(vocab_size, vocab_size).scatter(1, bigrams.long(), logits)
    for seed in range(20):
        batch = make_batch([Row([0], 1, seed % vocab_size, w=0, n=n, g=1)])
        draws = some_draws(batch, bigrams, n - 1, seed)
        draws.temperature[:], draws.logits = 0.7, logits
        pages = make_pages(1, 8, 0, n)
        tree = TorchOps.propose(pages, batch, full_length(1, n), bigrams, draws)
        token, picked = seed % vocab_size, []
        for depth in range(n - 1):
            noise = gumbel_noise(draws.seeds[0, depth], torch.arange(vocab_size))
            token = int((table[token].double() / 0.7 + noise).argmax())
            picked.append(token)
        assert tree.tokens[0, 1:n].tolist() == picked


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(500)[:, None], torch.arange(400))
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    expected = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert (uniform - expected).abs().max() < 0.005
