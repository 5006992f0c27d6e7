# SPDX-License-Identifier: Apache-2.0
"""Lookahead's place in `VllmConfig`: a `SpeculativeConfig` of its own."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_lookahead.params import MAX_TREE_NODES, METHOD, OPTIONS, LookaheadParams

logger = init_logger("vllm.lookahead")

# Without a window, whose 59 nodes of W=15, N=5 are not verified: simulated, 64 nodes of
# candidates make 2.9 tokens a step (docs/drafting.md).
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
WIDTHS = {"window_size", "verification_set_size"}


def default_params(device_type: str) -> LookaheadParams:
    """The sizes that lookahead picks by itself on a kind of device."""
    return CPU_DEFAULTS if device_type == "cpu" else GPU_DEFAULTS


def with_defaults(given: Mapping[str, Any], is_chain: bool = False) -> LookaheadParams:
    """Sizes, and for those left out the platform's, or those of one chain.

    Of trees whose width is given the platform's budget says nothing.
    """
    default = default_params(current_platform.device_type)
    sizes = asdict(default.chain if is_chain else default)
    if given.keys() & WIDTHS:
        sizes["node_budget"] = MAX_TREE_NODES
    return LookaheadParams(**sizes | dict(given))


def may_rank(given: Mapping[str, Any]) -> bool:
    """Whether sizes leave it open which nodes are fed: no budget, and no window."""
    return "node_budget" not in given and not given.get("window_size")


def refuse_branches(params: LookaheadParams, why: str) -> None:
    """Raise for sizes of trees that branch, where they cannot."""
    for name, most in (("window_size", 0), ("verification_set_size", 1)):
        if (size := getattr(params, name)) > most:
            raise ValueError(
                f"{name}={size} needs draft trees that branch, and this model has "
                f"{why}: set {name} to {most}, or leave it out for one chain per step"
            )


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
    ranks_nodes: bool = Field(default=None)  # type: ignore[assignment]
    """Whether a step is fed only the nodes that are worth their time, the likeliest of
    all requests. With a window, or where the budget is given, all are fed that fit."""
    asks_for_branches: bool = False
    """Whether a window or several branches were asked for by hand."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any], why_chain: str = "") -> Self:
        """Build the config from what a user wrote in `speculative_config`.

        Args:
            options: by name.
            why_chain: what the model has that trees cannot branch on, if anything.

        Raises:
            ValueError: an option that lookahead does not have, a size out of range,
                a draft tree that is too large, or one where there can be none; in one
                line.
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
        params = with_defaults(given, bool(why_chain))
        if why_chain:
            refuse_branches(params, why_chain)
            logger.info("One chain per step: this model has %s.", why_chain)
        if params.window_size > params.fed_window_size:
            raise ValueError(
                f"node_budget={params.node_budget} has no room for the window: with "
                f"window_size={params.window_size} a tree has {params.whole_size} "
                "tokens; raise node_budget to that, or set window_size to 0"
            )
        by_hand = bool(given.keys() & WIDTHS) and params.can_branch
        sizes = asdict(params) if why_chain else given
        return cls(**sizes, ranks_nodes=may_rank(given), asks_for_branches=by_hand)

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in OPTIONS}
        given = {name: size for name, size in named.items() if size is not None}
        if self.ranks_nodes is None:
            self.ranks_nodes = may_rank(given)
        sizes = with_defaults(given)
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
