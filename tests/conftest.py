# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, kernels run in Triton's interpreter.

Triton looks at the switch when it is first imported, by whichever test module is
collected first: hence here. vLLM on a CPU takes Triton for absent either way.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
