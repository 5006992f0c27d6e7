# SPDX-License-Identifier: Apache-2.0
"""Simulated strategies say what the model says, within their budgets."""

import importlib.util
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.simulate.agreement import count
from benchmarks.simulate.bigrams import load_bigrams
from benchmarks.simulate.fit import Samples, fit
from benchmarks.simulate.protocol import Tree
from benchmarks.simulate.record import Model, Oracle, load_records
from benchmarks.simulate.run import serve
from benchmarks.simulate.strategies import WEIGHTS, settings, start, weighted
from vllm_lookahead.core.draft.estimate import WEIGHTS as DRAFT_WEIGHTS

PROMPT = [5, 9, 5, 9, 7, 5, 9, 5, 3, 11, 5, 9]
MAX_TOKENS = 20
HAS_ARCTIC = importlib.util.find_spec("arctic_inference") is not None


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=24, eos_token_id=2, **sizes, **heads)
    return Model(LlamaForCausalLM(config))


@pytest.fixture(scope="module", params=[0.0, 0.8])
def served(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    records = load_records(
        model, [PROMPT], MAX_TOKENS, request.param, folder / "records.pt"
    )
    alone = load_bigrams(model, records, [], folder / "alone.npz")
    after = load_bigrams(model, records, [4], folder / "after.npz")
    return Oracle(model, records[0]), (alone, after)


@pytest.mark.parametrize(
    "name",
    [
        "lookup",
        pytest.param("suffix", marks=pytest.mark.skipif(not HAS_ARCTIC, reason="")),
        "recycling",
        "logitspec",
        "paper",
        "draft",
        "draft+alone",
        "draft+salt",
        "forest",
        "forest+window-recycled",
        "levels",
        "own",
        "own~context4~tail",
        "own~window~columns",
    ],
)
def test_output_is_plains_and_budgets_are_kept(served, name):
    oracle, bigrams = served
    for budget in (4, 16):
        for make in settings(name, budget).values():
            out = serve(oracle, make, budget, MAX_TOKENS, bigrams)
            assert sum(map(len, out.tokens)) <= MAX_TOKENS - 1
            assert max(out.nodes) <= budget


def test_answers_are_those_of_the_whole_text(model, served):
    """Nodes off plain's text are answered as a sequence without a tree would be."""
    oracle, _ = served
    tree = Tree.of(oracle.text[14])
    tree.add_chain([oracle.text[15], 3, 4], 8)
    tree.add_chain([6, oracle.text[16]], 8)
    answers = oracle.answer(14, tree, True)
    for node, path in enumerate(tree.paths()):
        with torch.inference_mode():
            text = torch.tensor([oracle.text[:15] + path])
            expected = model.model(text).logits[0, -1].log_softmax(-1)
        got = torch.from_numpy(answers.logprobs[node])
        ids = torch.from_numpy(answers.ids[node]).long()
        torch.testing.assert_close(got, expected[ids], rtol=1e-4, atol=1e-4)
        temperature = oracle.record.temperature
        noise = oracle.noise[15 + len(path) - len(PROMPT)]
        token = model.sample(expected, temperature, noise)
        assert answers.sampled[node] == token


def test_a_tree_is_walked_along_what_was_sampled():
    tree = Tree.of(1)
    tree.add_chain([2, 3], 9)
    tree.add_chain([2, 4, 5], 9)
    tree.add_chain([6], 9)
    assert tree.tokens == [1, 2, 3, 4, 5, 6]
    assert tree.parents == [-1, 0, 1, 1, 3, 0]
    assert tree.walk([2, 4, 0, 7, 0, 0]) == [0, 1, 3]


@pytest.mark.parametrize("name", ["forest", "draft"])
def test_weights_are_fitted_to_what_followed(served, name):
    oracle, bigrams = served
    first = start(name)
    samples = Samples(list(first), name == "draft")
    make = weighted(name, 8, first)
    serve(oracle, make, 8, MAX_TOKENS, bigrams, samples.watch)
    rows, missing, followed = samples.tensors()

    def loss(weights):
        values = torch.tensor([weights[term] for term in samples.names])
        logits = samples.scores(rows, values).masked_fill(missing, -torch.inf)
        return float(torch.nn.functional.cross_entropy(logits, followed))

    fitted = fit(samples, first)
    assert loss(fitted) < loss(first)
    assert list(fitted) == list(first)
    # The fitted weights are a drafter's.
    serve(oracle, weighted(name, 8, fitted), 8, MAX_TOKENS, bigrams)


def test_samples_of_the_drafter_give_its_chances(served):
    """What is fitted is what drafts."""
    oracle, bigrams = served
    weights = start("draft")
    samples, seen = Samples(list(weights), True), 0

    def watch(strategy, tree, answers, path):
        nonlocal seen
        before = len(samples.rows)
        samples.watch(strategy, tree, answers, path)
        rows = torch.from_numpy(samples.rows[before])  # after the root
        values = torch.tensor([weights[term] for term in samples.names])
        logits = samples.scores(rows, values)
        *chances, _ = logits.log_softmax(0).tolist()
        children = [i for i, parent in enumerate(tree.parents) if parent == 0]
        drafted = sorted(strategy.chances[i] for i in children)
        likeliest = sorted(chances)[len(chances) - len(drafted) :]
        assert drafted == pytest.approx(likeliest, rel=1e-3)
        seen += len(drafted)

    serve(oracle, weighted("draft", 16, weights), 16, MAX_TOKENS, bigrams, watch)
    assert seen > 20


def test_the_package_has_the_weights_that_were_fitted():
    fitted = json.loads(WEIGHTS.read_text())["draft"]["weights"]
    assert {name: round(x, 2) for name, x in fitted.items()} == DRAFT_WEIGHTS


def test_agreement_is_counted_by_the_longest_place_that_was_met():
    text = [7, 1, 2, 3, 8, 1, 2, 3, 9, 2, 8]
    met, right = count(text, 4)
    # 8 after 3: nothing met; then 2 after 1, 3 after 1 2, 9 after 1 2 3, not 8; after 9
    # nothing; and 8 after 2, not 3.
    assert met == {1: 2, 2: 1, 3: 1}
    assert right == {1: 1, 2: 1, 3: 0}
