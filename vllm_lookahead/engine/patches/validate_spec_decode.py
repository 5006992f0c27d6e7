# SPDX-License-Identifier: Apache-2.0
"""Validate a request against lookahead instead of against rejection sampling.

Why: here vLLM holds a request's parameters against the speculative config, in the
process that answers the request. Upstream refuses `min_p` and `logit_bias`, which
its rejection sampler ignores; sample-and-match draws from the request's own sampler.
Remove: when upstream lets a `SpeculativeConfig` validate requests.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_lookahead.params import METHOD, request_params

TARGET = "vllm.sampling_params:SamplingParams._validate_spec_decode"


class InvalidLookaheadRequest(VLLMValidationError, ValueError):
    """HTTP 400 for a client, a ValueError for an offline caller."""


def wrap(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if speculative_config is None or speculative_config.method != METHOD:
            return original(self, speculative_config)
        try:
            request_params(self.extra_args, speculative_config.params)
        except ValueError as error:
            raise InvalidLookaheadRequest(str(error)) from None

    return _validate_spec_decode
