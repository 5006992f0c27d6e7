# SPDX-License-Identifier: Apache-2.0
"""What lookahead finds out about the machine."""

import os

import pytest
import torch

pytest.importorskip("vllm")

from vllm_lookahead.engine.support import threads_per_worker  # noqa: E402


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        ({}, 1, 1),
        ({}, 2, 1),
        ({}, 8, 7),
        ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}, 2, 2),
        ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "7"}, 8, 1),
        ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "8"}, 8, 8),
        ({"VLLM_CPU_OMP_THREADS_BIND": "3"}, 8, 1),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-1"}, 2, 2),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0|1-3,5"}, 8, 4),
        ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, 2, 6),
        ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, 2, 6),
    ],
)
def test_threads_per_worker(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    cores: int,
    threads: int,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert threads_per_worker() == threads
