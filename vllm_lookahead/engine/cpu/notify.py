# SPDX-License-Identifier: Apache-2.0
"""Wake the reader of a message queue only when it may be asleep.

vLLM's queues between engine and worker notify their readers over a socket at each
message, which costs 0.15 ms and holds the interpreter. A reader sleeps only when it
has read nothing for a second: after a message younger than that, it polls.
"""

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

# Half of the time for which `SpinCondition` polls.
AWAKE_S = 0.5

_notify = SpinCondition.notify


def _notify_if_idle(self: SpinCondition) -> None:
    now = time.monotonic()
    last, self.last_message = getattr(self, "last_message", 0.0), now
    if now - last > AWAKE_S:
        _notify(self)


def notify_only_idle_readers() -> None:
    """Of every queue that this process writes to."""
    SpinCondition.notify = _notify_if_idle
