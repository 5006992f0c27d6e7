# SPDX-License-Identifier: Apache-2.0
"""Lookahead's place in `VllmConfig`: a `SpeculativeConfig` of its own."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_lookahead.params import METHOD, RANGES, LookaheadParams

# Fu et al. 2024 use this for 7B models.
GPU_DEFAULTS = LookaheadParams(window_size=15, ngram_size=5, verification_set_size=15)
# A CPU is compute-bound: there the window costs more than it finds, and branches as
# much. Two Zen 4 cores, a 5M model at temperature 0.8, HumanEval, GSM8K and MT-Bench:
# one chain 1.77x, 1.79x and 1.63x plain vLLM, at most four leaves 1.75x, 1.71x, 1.68x,
# eight 1.86x, 1.46x and 1.60x, at 1.59 to 1.79, 1.80 to 2.07, and 1.76 to 1.94 tokens a
# step.
CPU_DEFAULTS = LookaheadParams(window_size=0, ngram_size=8, verification_set_size=1)


def default_params(device_type: str) -> LookaheadParams:
    """The sizes that lookahead picks by itself on a kind of device."""
    return CPU_DEFAULTS if device_type == "cpu" else GPU_DEFAULTS


@config
class LookaheadConfig(SpeculativeConfig):
    """`VllmConfig.speculative_config` of an engine that runs lookahead.

    To the scheduler each request drafts N-1 tokens, of which it accepts a prefix.
    The worker widens them into a draft tree of up to T nodes, for which
    `LookaheadScheduler` leaves room. Sizes left out are the platform's.
    """

    method: Literal["lookahead"] = METHOD  # type: ignore[assignment]
    window_size: int = Field(default=None)  # type: ignore[assignment]
    """W, columns of the Jacobi window; 0 drafts from the n-gram pool alone."""
    ngram_size: int = Field(default=None)  # type: ignore[assignment]
    """N; at most N tokens are emitted per step."""
    verification_set_size: int = Field(default=None)  # type: ignore[assignment]
    """G, most candidate n-grams verified in a step."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the config from what a user wrote in `speculative_config`.

        Raises:
            ValueError: an option that lookahead does not have, a size out of range,
                or a draft tree that is too large; in one line.
        """
        if "num_speculative_tokens" in options:
            tokens = options["num_speculative_tokens"]
            raise ValueError(
                f"num_speculative_tokens={tokens!r} is not an option of lookahead: "
                "set ngram_size, which is one more"
            )
        for name in options.keys() - {"method", *RANGES}:
            raise ValueError(
                f"{name}={options[name]!r} is not an option of lookahead: "
                f"use {', '.join(RANGES)}"
            )
        given = {k: v for k, v in options.items() if k in RANGES and v is not None}
        defaults = default_params(current_platform.device_type)
        return cls(**asdict(LookaheadParams(**asdict(defaults) | given)))

    def __post_init__(self) -> None:
        defaults = default_params(current_platform.device_type)
        for name in RANGES:
            if getattr(self, name) is None:
                setattr(self, name, getattr(defaults, name))
        self.num_speculative_tokens = self.params.ngram_size - 1

    @property
    def params(self) -> LookaheadParams:
        return LookaheadParams(**{name: getattr(self, name) for name in RANGES})

    def compute_hash(self) -> str:
        """vLLM's, but no other method's: it keys the cache of compiled graphs.

        Attention layers of a GPU take queries that are not quantized yet.
        """
        return f"lookahead-{super().compute_hash()}"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in RANGES)
        return f"LookaheadConfig({sizes})"
