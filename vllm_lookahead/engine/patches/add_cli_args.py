# SPDX-License-Identifier: Apache-2.0
"""Add `--speculative lookahead` and the `--lookahead-*` options to the CLI.

Why: plugins cannot add options, and argparse takes `--speculative` for an
abbreviation of `--speculative-config`, which wants JSON.
Remove: when a `SpeculativeConfig` subclass can add options of its own.
"""

import argparse
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from vllm.logger import init_logger

from vllm_lookahead.params import (
    METHOD,
    POOL_SCOPES,
    RANGES,
    REQUEST_PREFIX,
    check_range,
)

TARGET = "vllm.engine.arg_utils:EngineArgs.add_cli_args"

logger = init_logger("vllm.lookahead")

HELP = {
    "window_size": "W, columns of the Jacobi window; 0 for none.",
    "ngram_size": "N; at most N tokens are generated per step.",
    "verification_set_size": "G, most candidates of one depth of a draft tree.",
    "node_budget": "Most tokens fed per step and request.",
}


class _Speculative(argparse.Action):
    """The word selects the method, JSON is `--speculative-config`: they combine."""

    def __call__(self, parser, namespace, value, option_string=None):
        dest = "spec_method" if value == METHOD else "speculative_config"
        setattr(namespace, dest, value)


def _method_or_json(parse_json: Any, text: str) -> Any:
    if text == METHOD:
        return text
    try:
        return parse_json(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {METHOD!r} nor JSON, as for --speculative-config"
        ) from None


def _size(name: str, text: str) -> int:
    try:
        return check_range(name, int(text) if text.isdecimal() else text, *RANGES[name])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    native = {action.dest: action for action in parser._actions}
    method = native["spec_method"]
    group = parser.add_argument_group(
        title="LookaheadConfig",
        description="Lookahead decoding: speculation without a draft model.",
    )
    group.add_argument(
        "--speculative",
        action=_Speculative,
        type=partial(_method_or_json, native["speculative_config"].type),
        default=argparse.SUPPRESS,
        metavar=METHOD,
        help=f"`{METHOD}` turns lookahead decoding on. JSON, or keys as in "
        "`--speculative.method`, mean the same as for `--speculative-config`.",
    )
    for name, (low, high) in RANGES.items():
        group.add_argument(
            f"--{REQUEST_PREFIX}{name}".replace("_", "-"),
            type=partial(_size, name),
            metavar=f"{low}..{high}",
            help=f"{HELP[name]} Picked by platform if left out.",
        )
    group.add_argument(
        f"--{REQUEST_PREFIX}pool-scope".replace("_", "-"),
        choices=POOL_SCOPES,
        help="Whose text is drafted from: a request's own, or all that is in the K/V "
        "cache under its cache_salt.",
    )
    if method.choices is not None:
        method.choices = [*method.choices, METHOD]


def wrap(original: Any) -> Any:
    add_native: Callable[..., Any] = original.__func__

    @wraps(add_native)
    def add_cli_args(parser: Any) -> Any:
        parser = add_native(parser)
        try:
            _add_options(parser)
        except (argparse.ArgumentError, KeyError) as error:
            # Plain vLLM must start even where upstream took one of the names.
            logger.debug("lookahead adds no options: %s", error)
        return parser

    return staticmethod(add_cli_args)
