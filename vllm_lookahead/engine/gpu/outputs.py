# SPDX-License-Identifier: Apache-2.0
"""A step's output on its way to the host, with what was really drafted."""

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_lookahead.engine.outputs import LookaheadModelRunnerOutput


class AsyncLookaheadOutput(AsyncModelRunnerOutput):
    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        request_ids: list[str],
        longest: torch.Tensor,
    ) -> None:
        """Start the copy.

        Args:
            output: vLLM's.
            request_ids: those that were fed trees.
            longest: as many int32, the length of each tree's longest candidate.
        """
        self.output = output
        self.request_ids = request_ids
        self.longest = longest.to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.Event(blocking=True)
        self.copied.record()

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        self.copied.synchronize()
        drafted = zip(self.request_ids, self.longest.tolist(), strict=True)
        return LookaheadModelRunnerOutput.wrap(output, dict(drafted))
