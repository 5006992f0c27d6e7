# SPDX-License-Identifier: Apache-2.0
"""Lookahead's place in `VllmConfig`: a `SpeculativeConfig` of its own."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_lookahead.params import MAX_TREE_NODES, METHOD, OPTIONS, LookaheadParams

# Without a window, whose 59 nodes of W=15, N=5 are not verified: simulated, 64 nodes of
# candidates make 2.7 tokens a step (docs/drafting.md).
GPU_DEFAULTS = LookaheadParams(
    window_size=0, ngram_size=9, verification_set_size=32, node_budget=64
)
# A CPU is compute-bound, but for the few rows that a layer multiplies at once
# (`numba_kernels/linear.py`). SmolLM2-135M, fp32, two Zen 4 cores, four chat prompts of
# HumanEval and of GSM8K, greedy, one turn: chains of 8 nodes 1.79x and 1.71x plain
# vLLM, trees of at most 8 1.93x and 1.87x, of 16 and of 12 1.68x and 1.74x.
CPU_DEFAULTS = LookaheadParams(
    window_size=0, ngram_size=8, verification_set_size=4, node_budget=8
)


def default_params(device_type: str) -> LookaheadParams:
    """The sizes that lookahead picks by itself on a kind of device."""
    return CPU_DEFAULTS if device_type == "cpu" else GPU_DEFAULTS


def with_defaults(given: Mapping[str, Any]) -> LookaheadParams:
    """Sizes, and for those left out the platform's.

    Of trees whose width is given the platform's budget says nothing.
    """
    sizes = asdict(default_params(current_platform.device_type))
    if given.keys() & {"window_size", "verification_set_size"}:
        sizes["node_budget"] = MAX_TREE_NODES
    return LookaheadParams(**sizes | dict(given))


@config
class LookaheadConfig(SpeculativeConfig):
    """`VllmConfig.speculative_config` of an engine that runs lookahead.

    To the scheduler each request drafts N-1 tokens, of which it accepts a prefix.
    The worker widens them into a draft tree of up to T nodes, for which
    `LookaheadScheduler` leaves room. Sizes left out are the platform's.
    """

    method: Literal["lookahead"] = METHOD  # type: ignore[assignment]
    window_size: int = Field(default=None)  # type: ignore[assignment]
    """W, columns of the Jacobi window; 0 drafts without it."""
    ngram_size: int = Field(default=None)  # type: ignore[assignment]
    """N; at most N tokens are emitted per step."""
    verification_set_size: int = Field(default=None)  # type: ignore[assignment]
    """G, most candidates of one depth of the tree."""
    node_budget: int = Field(default=None)  # type: ignore[assignment]
    """Most tokens fed per step and request."""
    pool_scope: str = Field(default=None)  # type: ignore[assignment]
    """Whose text is drafted from: "request", or "salt"."""

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
        for name in options.keys() - {"method", *OPTIONS}:
            raise ValueError(
                f"{name}={options[name]!r} is not an option of lookahead: "
                f"use {', '.join(OPTIONS)}"
            )
        given = {k: v for k, v in options.items() if k in OPTIONS and v is not None}
        params = with_defaults(given)
        if params.window_size > params.fed_window_size:
            raise ValueError(
                f"node_budget={params.node_budget} has no room for the window: with "
                f"window_size={params.window_size} a tree has {params.whole_size} "
                "tokens; raise node_budget to that, or set window_size to 0"
            )
        return cls(**asdict(params))

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in OPTIONS}
        sizes = with_defaults({k: v for k, v in given.items() if v is not None})
        for name, size in asdict(sizes).items():
            setattr(self, name, size)
        self.num_speculative_tokens = self.params.ngram_size - 1

    @property
    def params(self) -> LookaheadParams:
        return LookaheadParams(**{name: getattr(self, name) for name in OPTIONS})

    def compute_hash(self) -> str:
        """vLLM's, but no other method's: it keys the cache of compiled graphs.

        Attention layers of a GPU take queries that are not quantized yet.
        """
        return f"lookahead-{super().compute_hash()}"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in OPTIONS)
        return f"LookaheadConfig({sizes})"
