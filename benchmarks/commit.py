# SPDX-License-Identifier: Apache-2.0
"""The commit that a result is of."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The name of what is checked out, -dirty if files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError:
        return None
    return done.stdout.strip() or None
