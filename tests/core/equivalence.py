# SPDX-License-Identifier: Apache-2.0
"""Hard-shaped random states on which every `LookaheadOps` must agree exactly."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from tests.core.build import Row, clone_pages, ints, make_batch, make_hints, make_pages
from vllm_lookahead.core.answers import Answers, likeliest_tokens
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import CONTEXT, EMPTY, NUM_ANSWERS, BlockPages
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams


class Shape(NamedTuple):
    """What a random state looks like; sizes of single requests vary below W, N, G."""

    w: int
    n: int
    g: int
    batch: int = 3
    block_size: int = 16
    num_blocks: int = 4  # per request, for its history
    vocab: int = 5  # few: nearly every key agrees
    empty_rings: bool = False
    holes: bool = False  # tokens that nobody recorded
    at_border: bool = False  # every root is the first token of its block
    same_sizes: bool = False  # every request has W, N, G and no limit


SHAPES = {
    "small": Shape(3, 4, 3),
    "one request": Shape(5, 4, 5, batch=1),
    "eight ragged requests": Shape(5, 5, 6, batch=8),
    "tree of one node": Shape(0, 2, 0),
    "tree of one node, window": Shape(1, 2, 0, same_sizes=True),
    "no window": Shape(0, 5, 8, vocab=2),
    "no candidates": Shape(4, 4, 0),
    "N = 2": Shape(6, 2, 4),
    "W = 1": Shape(1, 5, 3),
    "W beyond the block": Shape(20, 3, 4),
    "N = 16": Shape(2, 16, 3, holes=True),
    "tree of 120": Shape(15, 5, 15, same_sizes=True),
    "tree of 280": Shape(20, 8, 20, batch=2, vocab=3),
    "roots at block borders": Shape(4, 4, 4, batch=5, at_border=True),
    "empty rings": Shape(4, 4, 4, empty_rings=True),
    "holes in the history": Shape(3, 6, 4, holes=True),
    "one token only": Shape(3, 4, 3, vocab=1),
    "many tokens": Shape(3, 4, 3, vocab=100_000),
    "long": Shape(3, 4, 4, num_blocks=60, vocab=12),
    "blocks of 32": Shape(5, 4, 5, block_size=32),
    "blocks of 128": Shape(3, 4, 3, block_size=128, num_blocks=2),
}


# Tokens that have bigrams and are among answers; there may be more.
MOST_SAID = 60
STEPS = 6  # that a state has room for, behind the history


@dataclass
class State:
    """Everything that a step starts from."""

    pages: BlockPages
    batch: RequestBatch
    n: int
    g: int


def random_state(shape: Shape, seed: int) -> State:
    """A state as a long run leaves it, more tangled than one would."""
    rng = random.Random(seed)
    w, n, g, size = shape.w, shape.n, shape.g, shape.block_size

    torch.manual_seed(seed)

    def tokens(*dims: int) -> torch.Tensor:
        return torch.randint(0, shape.vocab, dims, dtype=torch.int32)

    room = shape.num_blocks * size
    most = LookaheadParams(w, n, g).max_tree_size
    per_request = -(-(room + most + STEPS * n) // size)
    total = shape.batch * per_request + 2
    pages = make_pages(total, size, w, n)
    pages.tokens[:] = tokens(total, size)
    if shape.holes:
        pages.tokens[torch.rand(total) < 0.3] = EMPTY
        pages.tokens[torch.rand(total, size) < 0.1] = EMPTY
    if not shape.empty_rings:
        for block in range(total):
            fill_page(pages, block, rng, tokens)
        fill_answers(pages, shape.vocab)

    blocks = rng.sample(range(total), total)
    rows = []
    for _ in range(shape.batch):
        position = rng.choice([1, 2, size - 1, size, size + 1, rng.randint(1, room)])
        if shape.at_border:
            position = size * rng.randint(1, shape.num_blocks)
        row = Row(
            blocks=[blocks.pop() for _ in range(per_request)],
            position=position,
            root=rng.randrange(shape.vocab),
            w=w,
            n=n,
            g=g,
        )
        if not shape.same_sizes:
            row.w = rng.choice([w, rng.randint(0, w)])
            row.n = rng.choice([n, rng.randint(2, n)])
            row.g = rng.choice([g, rng.randint(0, g)])
            row.max_nodes = rng.choice([most, rng.randint(1, most)])
        rows.append(row)
    return State(pages, make_batch(rows, filler=blocks[0]), n, g)


def random_hints(
    shape: Shape,
    n: int,
    seed: int,
    noise: Callable[[int, int, int], float] = cpu_noise,
) -> Hints:
    """Bigrams of most tokens, and noise for some requests."""
    torch.manual_seed(seed)
    vocab = min(shape.vocab, MOST_SAID)
    bigrams = distinct_tokens(vocab, 5, max(1, vocab - 1))
    bigrams[torch.rand(len(bigrams)) < 0.1] = EMPTY
    temperature = torch.rand(shape.batch)
    temperature[seed % 3 :: 3] = 0
    rng = random.Random(seed)
    return Hints(
        bigrams,
        falling_logprobs(*bigrams.shape),
        temperature,
        torch.randint(0, 2**63 - 1, (shape.batch, n - 1)),
        noise,
        [0.0, 0.001, 0.05][seed % 3],
        ints([rng.randint(0, 1) for _ in range(shape.batch)]) if seed % 2 else None,
    )


def random_answers(tree: DraftTree, vocab: int, seed: int) -> Answers:
    """Of the root and the candidates of each tree; trees in any order, rows between."""
    torch.manual_seed(seed)
    first_row, num_rows = [0] * len(tree.num_nodes), 0
    for b in torch.randperm(len(first_row)).tolist():
        first_row[b] = num_rows + 1
        num_rows += 1 + int((tree.kinds[b] == CANDIDATE).sum()) + 1
    tokens = distinct_tokens(min(vocab, MOST_SAID), NUM_ANSWERS, num_rows)
    return Answers(tokens, falling_logprobs(*tokens.shape), ints(first_row))


def distinct_tokens(vocab: int, count: int, *rows: int) -> torch.Tensor:
    """[*rows, count] int32, each token at most once in a row, EMPTY behind them."""
    tokens = torch.full((*rows, count), EMPTY, dtype=torch.int32)
    drawn = torch.rand(*rows, vocab).argsort(-1)[..., :count].int()
    tokens[..., : drawn.shape[-1]] = drawn
    return tokens


def falling_logprobs(*shape: int) -> torch.Tensor:
    """As of likeliest tokens; the last ones may say less than silence."""
    return (2 * torch.randn(shape) - 4).clamp(max=0).sort(descending=True).values


def fill_answers(pages: BlockPages, vocab: int) -> None:
    """Rings that are empty, partly filled or turning; tokens before them unknown.

    Beyond its count a ring holds the last owner's answers.
    """
    num_blocks, kept, _ = pages.answers.shape
    contexts = pages.answers[..., :CONTEXT]
    contexts[:] = torch.randint(0, vocab, contexts.shape, dtype=torch.int32)
    contexts[torch.rand(contexts.shape) < 0.1] = EMPTY
    said = distinct_tokens(min(vocab, MOST_SAID), NUM_ANSWERS, num_blocks, kept)
    pages.answers[..., CONTEXT:] = said
    pages.answer_logprobs[:] = falling_logprobs(*said.shape)
    counts = torch.randint(0, 3 * kept, (num_blocks,), dtype=torch.int32)
    pages.answer_count[:] = counts * (torch.rand(num_blocks) < 0.8)


def fill_page(pages: BlockPages, block: int, rng: random.Random, tokens) -> None:
    """A ring that is empty, partly filled or turning; a window, gaps or none."""
    size, width = pages.ring.shape[1:]
    count = rng.choice([0, rng.randint(0, size), rng.randint(size, 4 * size + 1)])
    pages.ring_count[block] = count
    grams = tokens(size, width)
    for gram in grams:
        gram[rng.randint(2, width) :] = EMPTY  # of a request with a smaller N
    grams[count:] = EMPTY
    pages.ring[block] = grams
    if rng.random() < 0.7:
        pages.window[block] = tokens(*pages.window.shape[1:])
        if rng.random() < 0.3:
            pages.window[block, :, rng.randrange(width) :] = EMPTY


def random_samples(tree: DraftTree, vocab: int, seed: int) -> torch.Tensor:
    """Tokens sampled at the nodes: half of them lead on to some child."""
    rng = random.Random(seed)
    sampled = [[rng.randrange(vocab) for _ in row] for row in tree.tokens]
    for row, nodes in zip(sampled, tree.nodes(), strict=True):
        for node in nodes:
            if node.kind == CANDIDATE and rng.random() < 0.5:
                row[node.parent] = node.token
    return ints(sampled)


def assert_same_pages(one: BlockPages, other: BlockPages) -> None:
    for f in fields(BlockPages):
        assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name


def assert_same_trees(one: DraftTree, other: DraftTree) -> None:
    """All fields of all nodes; the padding is anyone's."""
    assert torch.equal(one.num_nodes, other.num_nodes)
    assert one.tokens.shape == other.tokens.shape
    node = torch.arange(one.tokens.shape[1])
    live = node < one.num_nodes[:, None]
    for name in ("tokens", "parents", "depths", "kinds"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype == torch.int32, name
        assert torch.equal(a[live], b[live]), name


def assert_same_verdicts(one: Verdict, other: Verdict) -> None:
    for f in fields(Verdict):
        a, b = getattr(one, f.name), getattr(other, f.name)
        assert a.dtype == b.dtype == torch.int32, f.name
        assert torch.equal(a, b), f.name


def random_caches(num_blocks: int, block_size: int) -> list[torch.Tensor]:
    """K and V as a CPU cache and as a GPU cache has them."""
    cpu_k = torch.randn(num_blocks, 2, 4, block_size).permute(0, 3, 1, 2)
    cpu_v = torch.randn(num_blocks, 2, block_size, 4).permute(0, 2, 1, 3)
    gpu = torch.randn(2, num_blocks, block_size, 2, 4)
    return [cpu_k, cpu_v, gpu[0], gpu[1]]


def assert_same_ops(
    other: LookaheadOps,
    state: State,
    shape: Shape,
    seed: int,
    noise: Callable[[int, int, int], float] = cpu_noise,
) -> int:
    """Each op alone, on ReferenceOps' inputs. Returns the most tokens emitted."""
    reference, size = ReferenceOps(), state.pages.block_size
    torch.manual_seed(seed)
    total = len(state.pages.tokens)

    slots = torch.randperm(total * size)[: 3 * size]
    slots[::5] = -1
    values = torch.randint(0, shape.vocab, slots.shape)
    written = [clone_pages(state.pages) for _ in range(2)]
    reference.write_tokens(written[0], slots, values)
    other.write_tokens(written[1], slots, values)
    assert_same_pages(*written)

    before = clone_pages(state.pages)
    batch = copy.deepcopy(state.batch)
    nothing = make_hints(shape.batch, state.n, noise=noise)
    for hints in (nothing, random_hints(shape, state.n, seed, noise)):
        tree, chances = reference.draft(state.pages, state.batch, hints, state.g)
        again, own = other.draft(state.pages, batch, hints, state.g)
        assert_same_trees(tree, again)
        torch.testing.assert_close(own, chances)
    assert_same_pages(state.pages, before)
    for f in fields(RequestBatch):
        assert torch.equal(getattr(batch, f.name), getattr(state.batch, f.name))

    sampled = random_samples(tree, shape.vocab, seed)
    verdict = reference.verify(tree, sampled, state.n)
    assert_same_verdicts(verdict, other.verify(tree, sampled, state.n))

    caches = random_caches(total, size)
    copies = [cache.clone() for cache in caches]
    reference.compact(copies, state.batch, verdict, size)
    other.compact(caches, state.batch, verdict, size)
    for one, two in zip(copies, caches, strict=True):
        assert torch.equal(one, two)

    updated = [clone_pages(state.pages) for _ in range(2)]
    reference.update(updated[0], state.batch, tree, sampled, verdict)
    other.update(updated[1], state.batch, tree, sampled, verdict)
    assert_same_pages(*updated)

    answers = random_answers(tree, shape.vocab, seed)
    reference.keep_answers(updated[0], state.batch, tree, verdict, answers)
    other.keep_answers(updated[1], state.batch, tree, verdict, answers)
    assert_same_pages(*updated)
    return int(verdict.num_emitted.max())


def assert_same_likeliest_tokens(
    likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    vocab: int,
    dtype: torch.dtype,
) -> None:
    """Many logits are equal in bf16; tokens may be barred, all of a row's as well."""
    torch.manual_seed(vocab)
    logits = (5 * torch.randn(6, vocab)).to(dtype)
    logits[0, ::3] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, ::7] = torch.nan
    logits[3] += 1000
    tokens, logprobs = likeliest_tokens(logits)
    own_tokens, own_logprobs = likeliest(logits)
    assert own_tokens.dtype == torch.int32 and own_logprobs.dtype == torch.float32
    assert torch.equal(own_tokens, tokens)
    torch.testing.assert_close(own_logprobs, logprobs, rtol=1e-6, atol=1e-4)


def run_steps(
    ops: LookaheadOps,
    state: State,
    shape: Shape,
    seed: int,
    noise: Callable[[int, int, int], float] = cpu_noise,
) -> list[tuple[DraftTree, Verdict]]:
    """STEPS steps, each on what the op's own last one left."""
    pages, batch = state.pages, copy.deepcopy(state.batch)
    size, done = pages.block_size, []
    for step in range(seed, seed + STEPS):
        ops.write_tokens(pages, batch.root_slots(size), batch.root)
        hints = random_hints(shape, state.n, step, noise)
        tree, _ = ops.draft(pages, batch, hints, state.g)
        sampled = random_samples(tree, shape.vocab, step)
        verdict = ops.verify(tree, sampled, state.n)
        ops.update(pages, batch, tree, sampled, verdict)
        answers = random_answers(tree, shape.vocab, step)
        ops.keep_answers(pages, batch, tree, verdict, answers)
        done.append((tree, verdict))
        last = verdict.num_emitted[:, None].long() - 1
        batch.root = verdict.tokens.gather(1, last)[:, 0]
        batch.position = batch.position + verdict.num_emitted
    return done
