# SPDX-License-Identifier: Apache-2.0
"""Lookahead on vLLM's V1 model runner, which is what a CPU runs."""
