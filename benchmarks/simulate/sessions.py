# SPDX-License-Identifier: Apache-2.0
"""Requests that one tenant sends one after the other, none a prefix of the next.

"sessions": an agent works at a function of HumanEval, and starts each call with a text
of its own: it has the function written, written again under another name, mended after
a test that failed, and explained. "retries": a prompt again, with another seed.
"""

import re
from pathlib import Path

from benchmarks.prompts import FILES, rows

CALLS = (
    "Complete this Python function. Answer with the whole function.\n\n{prompt}",
    "I need a second version of a function, named {name}_v2. Write all of it.\n\n"
    "{renamed}",
    "A test failed:\n\n{test}\n\nWrite the function again so that it passes.\n\n"
    "{prompt}",
    "What does this code do, step by step?\n\n{prompt}{canonical_solution}",
)
NUM_RETRIES = 3
SETS = ("sessions", "retries")


def load(name: str, data_dir: str, num_functions: int) -> list[str]:
    """The prompts of a set, in the order in which they come."""
    prompts: list[str] = []
    for row in list(rows(Path(data_dir) / FILES["humaneval"]))[:num_functions]:
        entry = row["entry_point"]
        asserts = re.findall(r"^ *(assert .*)$", row["test"], re.MULTILINE)
        values = row | {
            "name": entry,
            "renamed": row["prompt"].replace(entry, f"{entry}_v2"),
            "test": "\n".join(asserts[:2]).replace("candidate", entry),
        }
        calls = CALLS if name == "sessions" else CALLS[:1] * NUM_RETRIES
        prompts += [call.format_map(values) for call in calls]
    return prompts
