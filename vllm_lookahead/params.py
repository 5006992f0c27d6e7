# SPDX-License-Identifier: Apache-2.0
"""The numbers of lookahead decoding, and their per-request overrides.

Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using
Lookahead Decoding", section 3: window size W, n-gram size N, and verification
set size G; and a budget of nodes. Imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

METHOD = "lookahead"  # of vLLM's `speculative_config`

MAX_TREE_NODES = 512
# Inclusive ranges, by the name that a user types.
RANGES: dict[str, tuple[int, int]] = {
    "window_size": (0, 64),
    "ngram_size": (2, 16),
    "verification_set_size": (0, 64),
    "node_budget": (1, MAX_TREE_NODES),
}
# Whose text is drafted from: a request's own, or all in the cache under its salt.
POOL_SCOPES = OWN, SALT = "request", "salt"
OPTIONS = (*RANGES, "pool_scope")

REQUEST_SWITCH = "lookahead"
REQUEST_PREFIX = "lookahead_"


@dataclass(frozen=True)
class LookaheadParams:
    """Sizes of one request's draft tree.

    Attributes:
        window_size: W, columns of the Jacobi window; 0 leaves the window out.
        ngram_size: N; an n-gram of the window is a key token and N-1 values. At most N
            tokens are emitted per step.
        verification_set_size: G, most candidates side by side: of one depth.
        node_budget: most tokens fed in a step. Where a whole tree does not fit, the
            window is left out and the likeliest candidates are chosen.
        pool_scope: OWN, or SALT: to draft from others' blocks too (`core.corpus`).
    """

    window_size: int
    ngram_size: int
    verification_set_size: int
    node_budget: int = MAX_TREE_NODES
    pool_scope: str = OWN

    def __post_init__(self) -> None:
        for name in RANGES:
            check_range(name, getattr(self, name), *RANGES[name])
        check_scope("pool_scope", self.pool_scope)
        size = self.whole_size
        if size > MAX_TREE_NODES:
            raise ValueError(
                f"window_size={self.window_size}, ngram_size={self.ngram_size}, "
                f"verification_set_size={self.verification_set_size} make a draft "
                f"tree of {size} tokens; at most {MAX_TREE_NODES} "
                "are supported: lower one of the three"
            )

    @property
    def can_branch(self) -> bool:
        """Whether a draft tree may be more than one chain."""
        return self.window_size > 0 or self.verification_set_size > 1

    @cached_property
    def chain(self) -> Self:
        """Of trees that are one chain, without a window."""
        g = min(1, self.verification_set_size)
        return replace(self, window_size=0, verification_set_size=g)

    @property
    def max_grown_nodes(self) -> int:
        """G(N-1): most candidates before the budget."""
        return self.verification_set_size * (self.ngram_size - 1)

    @property
    def whole_size(self) -> int:
        """Nodes without a budget: the root, all candidates and the window."""
        window = max(0, self.window_size * (self.ngram_size - 1) - 1)
        return 1 + self.max_grown_nodes + window

    @property
    def fed_window_size(self) -> int:
        """W, or 0 where the budget has no room for a whole tree: then none is fed."""
        return self.window_size if self.whole_size <= self.node_budget else 0

    @property
    def max_candidate_nodes(self) -> int:
        return min(self.max_grown_nodes, self.node_budget - 1)

    @property
    def max_window_nodes(self) -> int:
        """Window nodes other than the root, which is its node (0, 0)."""
        return max(0, self.fed_window_size * (self.ngram_size - 1) - 1)

    @property
    def max_tree_size(self) -> int:
        """T: the most tokens that one step feeds for one request."""
        return 1 + self.max_candidate_nodes + self.max_window_nodes


def check_range(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int, or raise ValueError naming option and range."""
    is_whole = isinstance(value, int) or (
        isinstance(value, float) and value.is_integer()
    )
    if not is_whole or not low <= value <= high:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be a whole number "
            f"from {low} to {high}"
        )
    return int(value)


def check_scope(name: str, value: Any, server: str = SALT) -> str:
    """Return `value`, or raise ValueError naming option and values.

    Args:
        name: of the option.
        value: what was asked for.
        server: a request may not widen this one.
    """
    if value not in POOL_SCOPES:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be {' or '.join(POOL_SCOPES)}"
        )
    if value == SALT != server:
        raise ValueError(
            f"{name}={value!r} is not allowed: the server shares nothing among "
            f"requests; start it with pool_scope={SALT!r}"
        )
    return str(value)


def request_params(
    extra_args: Mapping[str, Any] | None, server: LookaheadParams
) -> LookaheadParams | None:
    """The sizes that one request runs with.

    Args:
        extra_args: `SamplingParams.extra_args` (over HTTP: `vllm_xargs`). Keys
            read: "lookahead" (0 or 1), "lookahead_<size>" for each size of
            `LookaheadParams`, at most the server's, and "lookahead_pool_scope".
        server: the sizes the server was started with.

    Returns:
        The request's sizes, or None when the request is switched off.

    Raises:
        ValueError: an unknown `lookahead_*` key, or a value out of range.
    """
    if not extra_args:
        return server
    sizes: dict[str, Any] = {}
    for key, value in extra_args.items():
        if not key.startswith(REQUEST_PREFIX):
            continue
        name = key.removeprefix(REQUEST_PREFIX)
        if name not in OPTIONS:
            known = ", ".join([REQUEST_SWITCH, *(REQUEST_PREFIX + n for n in OPTIONS)])
            raise ValueError(f"unknown option {key}={value!r}: use one of {known}")
        if name == "pool_scope":
            sizes[name] = check_scope(key, value, server.pool_scope)
            continue
        low, high = RANGES[name][0], getattr(server, name)
        sizes[name] = check_range(key, value, low, high)
    on = check_range(REQUEST_SWITCH, extra_args.get(REQUEST_SWITCH, 1), 0, 1)
    if not on:
        return None
    if not sizes:
        return server
    return replace(server, **sizes)
