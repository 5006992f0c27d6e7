# SPDX-License-Identifier: Apache-2.0
"""Names of engines in commands and results, for those who write and who read them."""

PLAIN = "plain"  # vLLM without lookahead
SIZES = "15/5/15"  # W/N/G of the lookahead that the targets are of
LOOKAHEAD = f"lookahead:{SIZES}"  # to `--methods` of `benchmarks/offline.py`
