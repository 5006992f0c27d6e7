# SPDX-License-Identifier: Apache-2.0
"""Lookahead speculative decoding for vLLM, as a plugin."""

from importlib.metadata import version

__version__ = version("vllm-lookahead")
