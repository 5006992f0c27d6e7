# SPDX-License-Identifier: Apache-2.0
"""The operations of a lookahead step on a CPU, as explicit loops in Numba."""
