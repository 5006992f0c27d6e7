# SPDX-License-Identifier: Apache-2.0
"""Lookahead speculative decoding for vLLM, as a plugin."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-lookahead")
except PackageNotFoundError:
    # Without its metadata vLLM does not find the plugin, nor Python the kernels.
    raise ImportError(
        "vllm-lookahead is not installed; in a clone of it, run "
        "pip install --no-deps --no-build-isolation -e ."
    ) from None
