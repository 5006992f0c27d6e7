# SPDX-License-Identifier: Apache-2.0
"""A logits processor as a user would bring."""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class NoTokenTwiceInARow(AdapterLogitsProcessor):
    """Bans the last token of every request."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        def ban_last(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if output:
                logits[output[-1]] = float("-inf")
            return logits

        return ban_last
