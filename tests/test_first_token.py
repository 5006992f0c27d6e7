# SPDX-License-Identifier: Apache-2.0
"""What a token follows when the model is asked for its successors."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lookahead.engine import bigrams

BOS, COMMA = 1, 44


class Tokenizer:
    bos_token_id = BOS

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begins = [BOS] if self.adds_bos and add_special_tokens else []
        return begins + [ord(c) for c in text]


@pytest.mark.parametrize(("adds_bos", "first"), [(True, BOS), (False, COMMA)])
def test_a_token_of_the_prompts_own_or_a_comma(
    adds_bos: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(adds_bos)
    monkeypatch.setattr(bigrams, "cached_tokenizer_from_config", lambda _: tokenizer)
    config: Any = SimpleNamespace(skip_tokenizer_init=False)
    assert bigrams._prefix(config).tolist() == [first]


@pytest.mark.parametrize("skipped", [True, False])
def test_without_a_tokenizer_none(
    skipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any) -> Any:
        raise OSError("a tokenizer of the model's own")

    monkeypatch.setattr(bigrams, "cached_tokenizer_from_config", fail)
    config: Any = SimpleNamespace(skip_tokenizer_init=skipped)
    assert bigrams._prefix(config).tolist() == []
