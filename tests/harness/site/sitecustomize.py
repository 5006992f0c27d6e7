# SPDX-License-Identifier: Apache-2.0
"""Make vLLM believe in Triton on a CPU: every child process imports this first."""

from types import SimpleNamespace

import triton.backends

if "cpu" not in triton.backends.backends:
    triton.backends.backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True), compiler=None
    )
