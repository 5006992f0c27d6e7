# SPDX-License-Identifier: Apache-2.0
"""What scheduler and worker tell each other beside vLLM's own."""

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class LookaheadSchedulerOutput(SchedulerOutput):
    """A `SchedulerOutput` that says how wide its trees may be, and what some are.

    Attributes:
        max_nodes: request id -> nodes that its tree may have, the root among them;
            input tokens and K/V slots of as many are reserved.
        paths: request id -> position of the first token, and tokens; of each request
            with a grammar that has drafts in this step, see `engine.paths`.
    """

    max_nodes: dict[str, int] = field(default_factory=dict)
    paths: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


@dataclass
class LookaheadModelRunnerOutput(ModelRunnerOutput):
    """A `ModelRunnerOutput` that says how much was really drafted.

    Attributes:
        num_draft_tokens: request id -> length of the longest candidate that the
            step verified. The scheduler reserved N-1 without knowing.
    """

    num_draft_tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def wrap(
        cls, output: ModelRunnerOutput, num_draft_tokens: dict[str, int]
    ) -> "LookaheadModelRunnerOutput":
        return cls(**vars(output), num_draft_tokens=num_draft_tokens)
