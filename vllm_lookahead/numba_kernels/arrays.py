# SPDX-License-Identifier: Apache-2.0
"""Tensors as the arrays that kernels take: no copy, one type per argument.

A kernel is compiled for each combination of argument types that it meets, so
every one is pinned to a dtype and to C order.
"""

from weakref import WeakKeyDictionary

import numpy as np
import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages

# Pages live as long as the engine, and a view costs 1 us to make.
_PAGE_ARRAYS: WeakKeyDictionary[BlockPages, list[np.ndarray]] = WeakKeyDictionary()


def array(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """An input. Copied if it is strided."""
    if tensor.dtype != dtype:
        raise TypeError(f"expected {dtype}, got {tensor.dtype}")
    return tensor.contiguous().numpy()


def output_array(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Written in place."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise TypeError(
            f"expected a contiguous tensor of {dtype}, got {tensor.dtype} with "
            f"strides {tensor.stride()}"
        )
    return tensor.numpy()


def page_arrays(pages: BlockPages) -> list[np.ndarray]:
    """The tensors of `pages`, which are never replaced, only written."""
    if pages not in _PAGE_ARRAYS:
        _PAGE_ARRAYS[pages] = [
            output_array(page, torch.float32 if "logprobs" in name else torch.int32)
            for name, page in vars(pages).items()
        ]
    return _PAGE_ARRAYS[pages]


def batch_arrays(batch: RequestBatch) -> list[np.ndarray]:
    columns = (
        batch.block_table,
        batch.position,
        batch.root,
        batch.window_size,
        batch.ngram_size,
        batch.verification_set_size,
        batch.max_nodes,
    )
    return [array(column, torch.int32) for column in columns]
