# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding on tensors. Imports nothing from vLLM."""
