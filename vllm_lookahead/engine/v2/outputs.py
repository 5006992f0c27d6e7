# SPDX-License-Identifier: Apache-2.0
"""A step's output on its way to the host, with what was really drafted."""

import torch
from vllm.v1.outputs import (
    AsyncModelRunnerOutput,
    KVConnectorOutput,
    ModelRunnerOutput,
)
from vllm.v1.worker.gpu.async_utils import stream

from vllm_lookahead.engine.outputs import LookaheadModelRunnerOutput


class Drafted:
    """How long each tree's longest candidate was, copied while the step goes on."""

    def __init__(
        self,
        request_ids: list[str],
        longest: torch.Tensor,
        main_stream: torch.cuda.Stream,
        copy_stream: torch.cuda.Stream,
    ) -> None:
        """Start the copy.

        Args:
            request_ids: those that were fed trees.
            longest: as many int32; the next step may overwrite them.
            main_stream: where `longest` is written.
            copy_stream: where vLLM's output will be copied, after this.
        """
        self.request_ids = request_ids
        self.longest = longest.clone()
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self.lengths = self.longest.to("cpu", non_blocking=True, copy=True)


class AsyncLookaheadOutput(AsyncModelRunnerOutput):
    """vLLM's output and `drafted`, which is there once vLLM's is."""

    def __init__(self, output: AsyncModelRunnerOutput, drafted: Drafted) -> None:
        self.output = output
        self.drafted = drafted

    def get_output(self) -> ModelRunnerOutput:
        output, drafted = self.output.get_output(), self.drafted
        lengths = zip(drafted.request_ids, drafted.lengths.tolist(), strict=True)
        return LookaheadModelRunnerOutput.wrap(output, dict(lengths))

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """vLLM's; asked for, from 0.33 on, when `get_output` fails."""
        return self.output.get_kv_connector_output()
