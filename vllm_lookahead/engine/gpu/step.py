# SPDX-License-Identifier: Apache-2.0
"""One step's trees, laid out in the V2 runner's flat batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.gpu.sizes import NGRAM, ROWS, TREE, VERIFY, WINDOW
from vllm_lookahead.engine.gpu.trees import TreeSlots, _feed_kernel

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_lookahead.engine.gpu.sizes import RequestSizes
