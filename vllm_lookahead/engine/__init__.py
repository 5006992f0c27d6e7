# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding inside vLLM's engine."""
