# SPDX-License-Identifier: Apache-2.0
"""A launcher refuses what its kernel would misread."""

from dataclasses import replace

import pytest
import torch

from tests.core.equivalence import Shape, State, random_state
from tests.kernels.build import REFERENCE, AnySizeTritonOps, poisoned
from vllm_lookahead.triton_kernels import checks
from vllm_lookahead.triton_kernels import verify as verify_kernels
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.verify import verify
from vllm_lookahead.triton_kernels.write import write_tokens


@pytest.fixture
def state() -> State:
    return random_state(Shape(3, 4, 3, block_size=8), seed=0)


def rows_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap between rows."""
    return torch.nn.functional.pad(values, (0, 1))[:, :-1]


def propose(state: State) -> None:
    AnySizeTritonOps().propose(state.pages, state.batch, state.g)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position", lambda x: x.long()),
        ("root", lambda x: x[:-1]),
        ("window_size", lambda x: torch.stack([x, x], 1)[:, 0]),
        ("block_table", lambda x: x.t().contiguous().t()),
        ("max_nodes", lambda x: x[:, None]),
    ],
)
def test_batch(state, name, change):
    changed = change(getattr(state.batch, name))
    state.batch = replace(state.batch, **{name: changed})
    with pytest.raises(ValueError, match=f"^{name} is"):
        propose(state)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda x: x[:-1]),
        ("ring", lambda x: x[..., :-1].contiguous()),
        ("ring_count", lambda x: x.long()),
        ("window", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    ],
)
def test_pages(state, name, change):
    pages = replace(state.pages, **{name: change(getattr(state.pages, name))})
    state.pages = pages
    with pytest.raises(ValueError, match=rf"^pages\.{name} is"):
        propose(state)
    with pytest.raises(ValueError, match=rf"^pages\.{name} is"):
        write_tokens(pages, torch.arange(3), torch.arange(3))


def test_slots_and_tokens(state):
    with pytest.raises(ValueError, match=r"^slots is torch\.int32"):
        write_tokens(state.pages, torch.arange(3).int(), torch.arange(3))
    with pytest.raises(ValueError, match=r"^tokens is torch\.float32 \(3,\)"):
        write_tokens(state.pages, torch.arange(3), torch.zeros(3))


def test_trees_and_what_is_written(state):
    tree = REFERENCE.propose(state.pages, state.batch, state.g)
    b, t = tree.tokens.shape
    verdict = REFERENCE.verify(tree, tree.tokens, 4)
    apart = replace(verdict, path=rows_apart(verdict.path))
    with pytest.raises(ValueError, match=r"^verdict.path is .* strides \(5, 1\)"):
        verify(tree, tree.tokens, apart)
    with pytest.raises(ValueError, match="^sampled is"):
        verify(tree, tree.tokens[:, 1:], verdict)
    moved = replace(tree, kinds=rows_apart(tree.kinds))
    with pytest.raises(ValueError, match=r"^tree.kinds and tree.tokens differ"):
        verify(moved, tree.tokens, verdict)
    start = torch.zeros(b + 1, dtype=torch.int32)
    flat = poisoned(b * t), poisoned(b * t)
    bits = poisoned(b, t, -(-t // 32))
    with pytest.raises(ValueError, match=r"^bits is .* takes torch.int32 \("):
        build_mask(tree, state.batch.position, start, bits[:, :-1], *flat)
    with pytest.raises(ValueError, match="^query_start_loc is"):
        build_mask(tree, state.batch.position, start[1:], bits, *flat)


def test_a_configuration_is_checked_once(state, monkeypatch):
    asked: list[str] = []

    def expect(name, *args, **kwargs):
        asked.append(name)
        return checks.expect(name, *args, **kwargs)

    monkeypatch.setattr(verify_kernels, "expect", expect)
    monkeypatch.setattr(verify_kernels, "_checked", checks.Checked())
    tree = REFERENCE.propose(state.pages, state.batch, state.g)
    verdict = REFERENCE.verify(tree, tree.tokens, 4)
    sampled = tree.tokens.contiguous()
    verify(tree, sampled, verdict)
    assert asked
    asked.clear()
    verify(tree, sampled.clone(), replace(verdict, path=verdict.path.clone()))
    assert not asked
    wide = torch.stack([sampled, sampled], 1)[:, 0]  # another stride
    for other in (sampled.long(), wide):
        verify(tree, other, verdict)
        assert asked
        asked.clear()
    for wrong in (tree.tokens.float(), tree.tokens[:, 1:], tree.tokens[:1]):
        for _ in range(2):
            with pytest.raises(ValueError, match="^sampled is"):
                verify(tree, wrong, verdict)


def test_configurations_are_forgotten_before_they_fill_memory():
    seen, sizes = checks.Checked(), range(2 * checks.Checked.MOST)
    for size in sizes:
        tensors = torch.zeros(3), torch.zeros(size)
        assert tensors not in seen
        seen.add(tensors)
        assert tensors in seen
    known = [size for size in sizes if (torch.zeros(3), torch.zeros(size)) in seen]
    assert known == list(sizes)[-len(known) :] and len(known) <= checks.Checked.MOST
