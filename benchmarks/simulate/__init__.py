# SPDX-License-Identifier: Apache-2.0
"""Drafting strategies compared at equal numbers of nodes, without an engine."""

import sys
from pathlib import Path

# The scripts beside this package import each other by their bare names.
sys.path.insert(0, str(Path(__file__).parents[1]))
