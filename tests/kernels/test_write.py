# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.core.build import clone_pages
from tests.core.equivalence import Shape, assert_same_pages, random_state
from tests.kernels.build import REFERENCE
from vllm_lookahead.triton_kernels.write import write_tokens


@pytest.mark.parametrize("n", [0, 1, 33, 100])
@pytest.mark.parametrize("w", [0, 3, 20])
def test_same_as_the_reference(n, w):
    pages = random_state(Shape(w, 3, 1, block_size=8), seed=w).pages
    before = clone_pages(pages)
    slots = torch.randperm(len(pages.tokens) * 8)[:n]
    slots[1::3] = -1
    tokens = torch.randint(0, 1000, (n,), dtype=torch.int32)
    expected = clone_pages(pages)
    REFERENCE.write_tokens(expected, slots, tokens)
    write_tokens(pages, slots, tokens)
    assert_same_pages(pages, expected)
    if n:
        with pytest.raises(AssertionError):
            assert_same_pages(pages, before)
