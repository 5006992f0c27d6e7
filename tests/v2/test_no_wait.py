# SPDX-License-Identifier: Apache-2.0
"""A step with trees never waits for the device, and allocates little."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")

from tests.harness.engines import Engines
from tests.harness.jobs import SMALL, prompts, request
from tests.harness.watch import Watch

KERNELS = ("feed", "mask", "write_tokens", "verify", "compact", "update", "likeliest")
KERNELS += ("keep_answers", "gather", "file", "draft", "store")
KERNELS = tuple(f"_{name}_kernel" for name in KERNELS)
NUM_LAYERS = 2
HELD = torch.tensor([3.0, 0.0, 1.0])  # as if by the device


@pytest.mark.parametrize(
    ("wait", "seen"),
    [
        (lambda x: x[0].item(), "item"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.to("cpu"), "to"),
        (lambda x: bool(x[0]), "__bool__"),
        (lambda x: range(x[1].int()), "__index__"),
        (lambda x: x.nonzero(), "aten.nonzero"),
        (lambda x: x[x > 0], "aten.index"),
        (lambda x: x.clone().masked_select(x > 0), "aten.masked_select"),
        (lambda x: torch.where(x > 0), "aten.nonzero"),
        (lambda x: x.repeat_interleave(x.long()), "aten.repeat_interleave"),
        (lambda x: torch.equal(x, 2 * x), "aten.equal"),
        (lambda x: torch.empty(3).copy_(x), "aten.copy_"),
        (lambda x: torch.accelerator.synchronize(), "synchronize"),
    ],
)
def test_a_wait_is_seen(wait: Callable, seen: str) -> None:
    for tensor in (HELD, HELD + 1):  # what is computed is the device's too
        watch = Watch((HELD, tensor))
        with watch.watching():
            wait(tensor)
        assert f"elsewhere: {seen}" in watch.waits


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.to("cpu", non_blocking=True).numpy(),
        lambda x: torch.tensor([1.0, 2.0]).tolist(),
        lambda x: torch.empty(3).copy_(x, non_blocking=True).tolist(),
        lambda x: x.clone().copy_(x),
        lambda x: x[torch.tensor([0, 2])].sum() * 2,
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: x.long().repeat_interleave(2, output_size=6),
    ],
)
def test_no_wait_is_made_up(call: Callable) -> None:
    watch = Watch(HELD)
    with watch.watching():
        call(HELD)
    assert not watch.waits


def test_step(engines: Engines) -> None:
    a, b, c, d = prompts(4, seed=16)
    off = {"lookahead": 0}
    jobs = [
        [
            request(a),
            request(b, temperature=0.7, top_p=0.9, seed=5),
            request(c, max_tokens=3, extra_args=off),
            request(d, max_tokens=3, repetition_penalty=1.5),
        ]
    ]
    result = engines.run(jobs, SMALL, watch=True)["watched"]
    assert result["steps"][0] == 0 and max(result["steps"]) == 3
    assert result["steps"][-1] > 0 and result["allocated"]
    assert not result["waits"]
    # The sampler's arguments, which vLLM gathers too where it verifies drafts, and
    # what is read by copies that may still be under way in the next step.
    assert sum(result["allocated"].values()) <= 10, result["allocated"]
    # As in docs/kernels.md. The interpreter attends by PyTorch where nobody drafts.
    launched = dict(result["launched"])
    assert launched.pop("tree_attention_kernel") == NUM_LAYERS
    assert launched == dict.fromkeys(KERNELS, 1)
    assert sum(result["operated"].values()) <= 12, result["operated"]
