# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, kernels run in Triton's interpreter; vLLM may be another version.

Triton looks at the switch when it is first imported, by whichever test module is
collected first: hence here. vLLM on a CPU takes Triton for absent either way.
"""

import os
import sys

import torch

from tests.harness.environment import OTHER_VLLM

if OTHER_VLLM:
    sys.path.insert(0, OTHER_VLLM)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
