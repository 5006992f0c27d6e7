# SPDX-License-Identifier: Apache-2.0
"""What `tests/core` asks of the model's bigrams, asked of the kernels."""

import inspect

import pytest
import torch

from tests.core import test_bigrams
from tests.kernels.build import AnySizeTritonOps

OF_ANY_OPS = {
    name: test
    for name, test in vars(test_bigrams).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["ops"]
}


@pytest.mark.parametrize("name", OF_ANY_OPS)
def test_on_triton(name, monkeypatch):
    for constant, value in vars(test_bigrams).copy().items():
        if isinstance(value, torch.Tensor):
            on_device = value.to(torch.get_default_device())
            monkeypatch.setattr(test_bigrams, constant, on_device)
    OF_ANY_OPS[name](AnySizeTritonOps())
