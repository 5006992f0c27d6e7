# SPDX-License-Identifier: Apache-2.0
"""vLLM's multiprocess executor, with one call per step where it makes two.

A call must be unpacked and answered, 0.1 ms of the worker's time. Between
`execute_model` and `sample_tokens` nothing happens but the work of a grammar. A step
that has one begins when that is done: with drafts that the grammar allows, which are
known only then, it says more than the work takes.
"""

from concurrent.futures import Future

import vllm.envs as envs
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import ModelRunnerOutput

from vllm_lookahead.engine.v1.notify import notify_only_idle_readers


class LookaheadExecutor(MultiprocExecutor):
    _to_execute: SchedulerOutput | None = None

    def _init_executor(self) -> None:
        notify_only_idle_readers()
        super()._init_executor()

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | None | Future[ModelRunnerOutput | None]:
        if not (non_block and scheduler_output.total_num_scheduled_tokens > 0):
            return super().execute_model(scheduler_output, non_block)
        self._to_execute = scheduler_output
        future: Future[ModelRunnerOutput | None] = Future()
        future.set_result(None)
        return future

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        scheduler_output, self._to_execute = self._to_execute, None
        if scheduler_output is None:
            return super().sample_tokens(grammar_output, non_block)
        return self.collective_rpc(
            "execute_and_sample",
            args=(scheduler_output, grammar_output),
            unique_reply_rank=self.output_rank,
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            kv_output_aggregator=self.kv_output_aggregator,
            ec_output_aggregator=self.ec_output_aggregator,
        )
