# SPDX-License-Identifier: Apache-2.0
"""What scheduler and worker tell each other beside vLLM's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_lookahead.engine.forest import Curve


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
    """A `SchedulerOutput` that says how wide its trees may be, and what some are.

    Attributes:
        max_nodes: request id -> nodes that its tree may have, the root among them;
            K/V slots of as many are reserved.
        best_nodes: how many nodes to feed beside the roots, the likeliest of all trees;
            input tokens of as many are reserved. None: all that `max_nodes` allows.
        paths: request id -> position of the first token, and tokens; of each request
            with a grammar that has drafts in this step, see `engine.paths`.
        given_out: with the pool scope "salt", else None.
    """

    max_nodes: dict[str, int] = field(default_factory=dict)
    best_nodes: int | None = None
    paths: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    given_out: GivenOut | None = None


@dataclass
class LookaheadModelRunnerOutput(ModelRunnerOutput):
    """A `ModelRunnerOutput` that says how much was really drafted.

    Attributes:
        num_draft_tokens: request id -> length of the longest candidate that the
            step verified. The scheduler reserved N-1 without knowing.
        chances: of the trees that the step before drafted, [rows, T-1] float32 of the
            nodes after the root, and the request of each row; None of no request.
        step_times: milliseconds of a step by its tokens and the tokens of the largest
            CUDA graph, when they were measured.
    """

    num_draft_tokens: dict[str, int] = field(default_factory=dict)
    chances: tuple[Sequence[str | None], np.ndarray] | None = None
    step_times: tuple[Curve, int] | None = None

    @classmethod
    def wrap(
        cls, output: ModelRunnerOutput, num_draft_tokens: dict[str, int], **more: Any
    ) -> "LookaheadModelRunnerOutput":
        return cls(**vars(output), num_draft_tokens=num_draft_tokens, **more)
