# SPDX-License-Identifier: Apache-2.0
"""Names of engines in commands and results, for those who write and who read them."""

PLAIN = "plain"  # vLLM without lookahead
LOOKAHEAD = "lookahead"  # of the sizes that it picks; both to `benchmarks/offline.py`
SIZES = "15/5/15"  # W/N/G of the paper: what kernels and single steps are timed at
