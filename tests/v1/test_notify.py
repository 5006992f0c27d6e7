# SPDX-License-Identifier: Apache-2.0
"""Messages between engine and worker arrive, notified or not."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

shm_broadcast = pytest.importorskip(
    "vllm.distributed.device_communicators.shm_broadcast"
)

from vllm_lookahead.engine.v1 import notify  # noqa: E402


@pytest.fixture
def notified(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a reader was notified."""
    times: list[float] = []
    original = shm_broadcast.SpinCondition.notify

    def count(condition):
        times.append(time.monotonic())
        original(condition)

    monkeypatch.setattr(notify, "_notify", count)
    monkeypatch.setattr(shm_broadcast.SpinCondition, "notify", original)
    notify.notify_only_idle_readers()
    return times


def test_only_a_reader_that_may_sleep_is_notified(notified: list[float]) -> None:
    queue = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
    reader = shm_broadcast.MessageQueue.create_from_handle(queue.export_handle(), 0)
    with ThreadPoolExecutor(1) as thread:
        ready = thread.submit(reader.wait_until_ready)
        queue.wait_until_ready()
        ready.result(timeout=10)

        for number in range(3):
            queue.enqueue(number)
            assert reader.dequeue(timeout=10) == number
        before = len(notified)
        assert before < 3

        asleep = thread.submit(reader.dequeue, timeout=30)
        polls = reader._spin_condition.busy_loop_s
        assert polls >= 2 * notify.AWAKE_S
        time.sleep(polls + 0.2)
        sent = time.monotonic()
        queue.enqueue("wake up")
        assert asleep.result(timeout=10) == "wake up"
        assert len(notified) == before + 1
        assert time.monotonic() - sent < 1
    queue.shutdown()
    reader.shutdown()
