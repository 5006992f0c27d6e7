# SPDX-License-Identifier: Apache-2.0
"""What the launchers ask of their arguments."""

from typing import Any

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import DraftTree

INTEGERS = (torch.int32, torch.int64)


def _guards(tensors: tuple[torch.Tensor, ...]) -> Any:
    """What tells whether tensors look like these: dtype, device, shape, strides."""
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(x.shape) for x in tensors],
        dynamic_dims_strides=[list(x.stride()) for x in tensors],
    )


def _has_guards() -> bool:
    """They are private to PyTorch: where they are gone, a launcher looks closely."""
    like, other = torch.zeros(2), torch.zeros(3)
    try:
        guards = _guards((like,))
        return guards.check(like) and not guards.check(other)
    except Exception:
        return False


HAS_GUARDS = _has_guards()


class Checked:
    """Tensors that a launcher has found right, known again by what they look like.

    That is dtype, device, shape and strides, which PyTorch's guards compare faster than
    Python asks for them: a launcher looks closely once per configuration. Of those that
    differ in more than the shape of the last tensor, the latest one is known.
    """

    MOST = 512

    def __init__(self) -> None:
        self._guards: dict[tuple[int, torch.Size], Any] = {}

    def __contains__(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        guards = self._guards.get((len(tensors), tensors[-1].shape))
        return guards is not None and guards.check(*tensors)

    def add(self, tensors: tuple[torch.Tensor, ...]) -> None:
        if not HAS_GUARDS:
            return
        if len(self._guards) == self.MOST:
            self._guards.clear()
        self._guards[len(tensors), tensors[-1].shape] = _guards(tensors)


def expect(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
    rows_apart: bool = False,
) -> None:
    """Raise unless a tensor is what a kernel will take it for.

    Args:
        name: of the argument, for the message.
        shape: -1 stands for any size.
        dtypes: those allowed; int32 if none is given.
        rows_apart: only the last dimension must be contiguous, not the whole.
    """
    dtypes = dtypes or (torch.int32,)
    size = tensor.shape
    fits = size == shape or (
        len(size) == len(shape)
        and all(want in (-1, n) for want, n in zip(shape, size, strict=True))
    )
    dense = tensor.stride(-1) == 1 if rows_apart else tensor.is_contiguous()
    if fits and tensor.dtype in dtypes and (dense or not tensor.numel()):
        return
    raise ValueError(
        f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
        f"{tensor.stride()}; the kernel takes {' or '.join(map(str, dtypes))} "
        f"{shape}, {'rows' if rows_apart else 'all of it'} contiguous"
    )


def expect_batch(batch: RequestBatch) -> None:
    """Check a batch."""
    b = batch.block_table.shape[0]
    expect("block_table", batch.block_table, (b, -1), rows_apart=True)
    expect("position", batch.position, (b,))
    expect("root", batch.root, (b,))
    expect("window_size", batch.window_size, (b,))
    expect("ngram_size", batch.ngram_size, (b,))
    expect("verification_set_size", batch.verification_set_size, (b,))
    expect("max_nodes", batch.max_nodes, (b,))


def expect_tree(tree: DraftTree, b: int, t: int) -> None:
    """Check B trees of up to T nodes."""
    for name in ("tokens", "parents", "depths", "kinds"):
        column = getattr(tree, name)
        expect(f"tree.{name}", column, (b, t), rows_apart=True)
        if column.stride(0) != tree.tokens.stride(0):
            raise ValueError(f"tree.{name} and tree.tokens differ in row stride")
    expect("tree.num_nodes", tree.num_nodes, (b,))
