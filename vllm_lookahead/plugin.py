# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point."""

import logging
import sys

from vllm_lookahead.params import METHOD


def register() -> None:
    """Let vLLM know of lookahead. Called by vLLM in each of its processes.

    May be called again. Never raises: vLLM would not catch it, and the error
    would stop servers that never asked for lookahead.
    """
    # Importing vLLM imports torch; before vLLM runs there is nothing to hook.
    if "vllm" not in sys.modules:
        return
    try:
        import vllm

        from vllm_lookahead.engine.patches import install, names

        install(names(vllm.__version_tuple__))
    except Exception as error:
        _explain(error)


def _names_method(argument: str) -> bool:
    """Whether an argument of the command line is the method, or JSON that names it."""
    return argument.split("=")[-1] == METHOD or f'"{METHOD}"' in argument


def _explain(error: Exception) -> None:
    """Tell whoever asks for lookahead, and nobody else, why it is not there."""
    reason = f"lookahead could not be installed in this vLLM: {error!r}"
    # `vllm serve` may fail on the option before it makes a configuration.
    asked = any(_names_method(argument) for argument in sys.argv[1:])
    level = logging.WARNING if asked else logging.DEBUG
    logging.getLogger("vllm.lookahead").log(level, reason)
    try:
        from vllm_lookahead.engine import patches
        from vllm_lookahead.engine.patches import refuse

        refuse.reason = f"{reason}; start without lookahead"
        patches.install(["refuse"])
        patches.install(patches.OPTIONS)
    except Exception:
        return
