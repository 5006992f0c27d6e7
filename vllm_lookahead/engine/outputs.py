# SPDX-License-Identifier: Apache-2.0
"""What scheduler and worker tell each other beside vLLM's own."""

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class GivenOut:
    """The blocks of a step that have new owners.

    Attributes:
        blocks: [n] K/V blocks, none of them written yet.
        salts: [n] as `core.corpus.salt_of` gives them, or NOBODY.
        of_requests: request id -> salt, of those that enter.
    """

    blocks: list[int] = field(default_factory=list)
    salts: list[int] = field(default_factory=list)
    of_requests: dict[str, int] = field(default_factory=dict)

    def add(self, blocks: list[int], salt: int) -> None:
        self.blocks += blocks
        self.salts += [salt] * len(blocks)


@dataclass
class LookaheadSchedulerOutput(SchedulerOutput):
    """A `SchedulerOutput` that says how wide its trees may be.

    Attributes:
        max_nodes: request id -> nodes that its tree may have, the root among them;
            input tokens and K/V slots of as many are reserved.
        given_out: with the pool scope "salt", else None.
    """

    max_nodes: dict[str, int] = field(default_factory=dict)
    given_out: GivenOut | None = None


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
