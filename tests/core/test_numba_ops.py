# SPDX-License-Identifier: Apache-2.0
"""What is NumbaOps' own; that it equals ReferenceOps is in test_equivalence.py."""

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from tests.core.build import Row, clone_pages, make_batch
from tests.core.equivalence import (
    SHAPES,
    State,
    assert_same_pages,
    assert_same_trees,
    assert_same_verdicts,
    random_answers,
    random_hints,
    random_samples,
    random_state,
)
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.ops import NumbaOps, warm_up
from vllm_lookahead.params import LookaheadParams


@pytest.fixture
def state() -> State:
    return random_state(SHAPES["tree of 120"], seed=0)


def drafted(name: str, state: State) -> DraftTree:
    hints = random_hints(SHAPES[name], state.n, seed=1)
    tree, _ = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
    return tree


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def strided(record):
    """The same tensors, none of them contiguous."""
    return type(record)(*(spread(getattr(record, f.name)) for f in fields(record)))


@pytest.mark.parametrize("name", SHAPES)
def test_the_mask_shows_ancestors(name):
    state = random_state(SHAPES[name], seed=1)
    tree = drafted(name, state)
    sees = torch.from_numpy(NumbaOps.ancestors(tree))
    assert torch.equal(sees, ReferenceOps.ancestors(tree))


def test_inputs_may_be_strided_or_wide(state):
    tree = drafted("tree of 120", state)
    sampled = random_samples(tree, 5, seed=0)
    verdict = NumbaOps.verify(tree, sampled, state.n)
    assert_same_verdicts(NumbaOps.verify(strided(tree), sampled.long(), 5), verdict)

    hints = random_hints(SHAPES["tree of 120"], state.n, seed=1)
    names = "bigrams", "bigram_logprobs", "temperature", "seeds"
    own_hints = replace(hints, **{n: spread(getattr(hints, n)) for n in names})
    own, _ = NumbaOps.draft(state.pages, strided(state.batch), own_hints, state.g)
    assert_same_trees(own, tree)

    pages = [clone_pages(state.pages) for _ in range(2)]
    answers = random_answers(tree, 5, seed=0)
    NumbaOps.keep_answers(pages[0], state.batch, tree, verdict, answers)
    own_verdict = strided(verdict)
    NumbaOps.keep_answers(
        pages[1], strided(state.batch), strided(tree), own_verdict, strided(answers)
    )
    assert_same_pages(*pages)


def test_other_tensors_are_refused(state):
    tree = drafted("tree of 120", state)
    wide = replace(tree, parents=tree.parents.long())
    with pytest.raises(TypeError, match=r"expected torch.int32, got torch.int64"):
        NumbaOps.verify(wide, tree.tokens, state.n)
    pages = replace(state.pages, tokens=state.pages.tokens.mT)
    with pytest.raises(TypeError, match=r"contiguous.*strides \(1, 16\)"):
        NumbaOps.write_tokens(pages, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(4, 32, 6), (4, 32, 2, 6)], ids=str)
def test_compaction_takes_caches_of_any_kind(dtype, shape):
    batch = make_batch([Row([2, 0], 30, 1), Row([3, 1], 9, 1), Row([1], 1, 1)])
    path = [[0, 5, 6, 9], [0, 1, 8, EMPTY], [0, EMPTY, EMPTY, EMPTY]]
    count = torch.tensor([4, 3, 1], dtype=torch.int32)
    verdict = Verdict(torch.empty(0), torch.tensor(path, dtype=torch.int32), count)
    cache = torch.randn(shape).to(dtype)
    before = cache.clone().float()
    expected = before.clone()
    ReferenceOps.compact([expected], batch, verdict, 32)
    NumbaOps.compact([cache], batch, verdict, 32)
    assert torch.equal(cache.float(), expected)
    assert not torch.equal(expected, before)


WARM_UP = """
import importlib, pkgutil
import torch
from vllm_lookahead import numba_kernels
from vllm_lookahead.numba_kernels.ops import warm_up
from vllm_lookahead.params import LookaheadParams

cache = torch.randn(2, 3, 16, 4).bfloat16().permute(0, 2, 1, 3)
before = cache.clone()
for sizes in [(5, 4, 5), (0, 8, 8), (1, 2, 0)]:
    warm_up(LookaheadParams(*sizes), 16, [cache])
assert torch.equal(cache, before)
for _, module, _ in pkgutil.iter_modules(numba_kernels.__path__):
    found = importlib.import_module(f"vllm_lookahead.numba_kernels.{module}")
    for name, kernel in vars(found).items():
        if hasattr(kernel, "signatures") and kernel.__module__ == found.__name__:
            print(f"{module}.{name}", len(kernel.signatures))
"""
CALLED_FROM_PYTHON = [
    "attention._attend",
    "answers._keep_answers_kernel",
    "answers._likeliest_kernel",
    "draft._draft_kernel",
    "layout.size_trees",
    "layout._lay_out_kernel",
    "mask._ancestors_kernel",
    "write._write_tokens_kernel",
    "update._update_kernel",
    "verify._verify_kernel",
    "compact._moves_kernel",
    "compact._move_kernel",
    "walk._advance_kernel",
]


def signatures(output: str) -> dict[str, int]:
    """Of every kernel, how often it was compiled or loaded."""
    return {name: int(n) for name, n in (x.split() for x in output.splitlines())}


def test_the_warm_up_compiles_each_kernel_once():
    python = [sys.executable, "-c", WARM_UP]
    done = subprocess.run(python, capture_output=True, text=True, check=True)
    # Those that others call are compiled with these, or come with them from the cache.
    found = signatures(done.stdout)
    called = {name: found[name] for name in CALLED_FROM_PYTHON}
    assert called == dict.fromkeys(CALLED_FROM_PYTHON, 1)


@pytest.mark.parametrize("sizes", [(0, 2, 0), (64, 2, 0), (0, 2, 64), (0, 16, 20)])
def test_the_warm_up_takes_any_sizes(sizes):
    warm_up(LookaheadParams(*sizes), 32)


@pytest.mark.slow
def test_without_a_folder_for_the_cache(tmp_path):
    """A read-only installation and no home: kernels compile in each process."""
    blocked = tmp_path / "file"
    blocked.touch()
    done = subprocess.run(
        [sys.executable, "-c", WARM_UP],
        env={**os.environ, "NUMBA_CACHE_DIR": f"{blocked}/folder"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(signatures(done.stdout)) > 20
