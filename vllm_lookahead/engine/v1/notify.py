# SPDX-License-Identifier: Apache-2.0
"""Wake the reader of a message queue only when it may be asleep.

Why: vLLM's queues between engine and worker notify their readers over a socket at
each message, which takes 0.15 ms and the interpreter. A reader sleeps only when it has
read nothing for `busy_loop_s`; after a message younger than that it polls.
Remove: when `SpinCondition.notify` knows that itself.

A process that stands still between writing a message and this may take its reader for
awake when it is not. Readers look again every `SHM_READER_RECHECK_INTERVAL_MS`, so a
message can then be late by that, as after any notification that zmq drops.
"""

import inspect
import time

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

_notify = SpinCondition.notify


def _awake_s() -> float:
    """Half of the time for which a reader polls; 0 if that is not known."""
    polls = inspect.signature(SpinCondition).parameters.get("busy_loop_s")
    looks_again = hasattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS")
    return polls.default / 2 if polls is not None and looks_again else 0.0


AWAKE_S = _awake_s()


def _notify_if_idle(self: SpinCondition) -> None:
    now = time.monotonic()
    last, self.last_message = getattr(self, "last_message", 0.0), now
    if now - last > AWAKE_S:
        _notify(self)


def notify_only_idle_readers() -> None:
    """Of every queue that this process writes to: it serves lookahead."""
    SpinCondition.notify = _notify_if_idle
