# SPDX-License-Identifier: Apache-2.0
"""The scheduler for async scheduling."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_lookahead.engine.scheduler import LookaheadScheduler


class LookaheadAsyncScheduler(LookaheadScheduler, AsyncScheduler):
    """Two steps in flight: the worker knows which drafts the placeholders are."""
