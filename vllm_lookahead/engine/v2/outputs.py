# SPDX-License-Identifier: Apache-2.0
"""A step's output on its way to the host, with what was really drafted."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.outputs import (
    AsyncModelRunnerOutput,
    KVConnectorOutput,
    ModelRunnerOutput,
)
from vllm.v1.worker.gpu.async_utils import stream

from vllm_lookahead.engine.forest import Curve
from vllm_lookahead.engine.outputs import LookaheadModelRunnerOutput


class Copied:
    """Numbers of some requests, on their way to the host while the step goes on."""

    def __init__(
        self, request_ids: Sequence[str | None], values: torch.Tensor, runner: Any
    ) -> None:
        """Start the copy.

        Args:
            request_ids: of each row.
            values: the next step may overwrite them.
            runner: its main stream is where `values` are written, its copy stream where
                vLLM's next output will be copied, after this.
        """
        self.request_ids = request_ids
        self.values = values.clone()
        main, copy = runner.main_stream, runner.output_copy_stream
        with stream(copy, main):
            copy.wait_stream(main)
            self.on_host = self.values.to("cpu", non_blocking=True, copy=True)


class AsyncLookaheadOutput(AsyncModelRunnerOutput):
    """vLLM's output, and what was copied before it: there once vLLM's is."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        drafted: Copied | None,
        chances: Copied | None,
        step_times: tuple[Curve, int] | None,
    ) -> None:
        """
        Args:
            output: of the step.
            drafted: how long the longest candidate of each tree was, if there was one.
            chances, step_times: see `LookaheadModelRunnerOutput`.
        """
        self.output = output
        self.drafted, self.chances = drafted, chances
        self.step_times = step_times

    def get_output(self) -> ModelRunnerOutput:
        output, drafted, chances = self.output.get_output(), self.drafted, self.chances
        lengths: Any = {}
        if drafted:
            ids = drafted.request_ids
            lengths = dict(zip(ids, drafted.on_host.tolist(), strict=True))
        return LookaheadModelRunnerOutput.wrap(
            output,
            lengths,
            chances=chances and (chances.request_ids, chances.on_host.numpy()),
            step_times=self.step_times,
        )

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """vLLM's; asked for, from 0.33 on, when `get_output` fails."""
        return self.output.get_kv_connector_output()
