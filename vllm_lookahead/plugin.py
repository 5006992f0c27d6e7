# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point."""

import sys


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
        import logging

        # Whoever asks for lookahead next gets vLLM's own "unknown method".
        logging.getLogger("vllm.lookahead").debug("Not installed: %r", error)
