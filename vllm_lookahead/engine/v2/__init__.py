# SPDX-License-Identifier: Apache-2.0
"""Lookahead on vLLM's V2 model runner: Triton kernels, no host sync in a step."""
