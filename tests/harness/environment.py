# SPDX-License-Identifier: Apache-2.0
"""Environments of the child processes: V2 on Triton's interpreter, or V1."""

import os
from pathlib import Path

HERE = Path(__file__).parent
# A folder with another version's `vllm` to test instead of the one installed; made by
# `tools/unpack_vllm.py`.
OTHER_VLLM = os.environ.get("LOOKAHEAD_TEST_VLLM", "")

COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
V2 = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "site"), OTHER_VLLM])),
}
V1 = {
    "TRITON_INTERPRET": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "PYTHONPATH": OTHER_VLLM,
}


def v2_environment(**extra: str) -> dict[str, str]:
    """The V2 runner, its Triton kernels run by Triton's interpreter."""
    return _inherited() | COMMON | V2 | extra


def v1_environment(**extra: str) -> dict[str, str]:
    """The V1 runner, without Triton: what a CPU serves with."""
    return _inherited() | COMMON | V1 | extra


def _inherited() -> dict[str, str]:
    dropped = ("VLLM_CPU_KVCACHE_SPACE", "PYTHONPATH")
    return {k: v for k, v in os.environ.items() if k not in dropped}
