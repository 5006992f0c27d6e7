# SPDX-License-Identifier: Apache-2.0
"""What the scheduler drafts under a grammar, without an engine."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node
from vllm_lookahead.engine import forced
from vllm_lookahead.engine.forced import ForcedTokens
from vllm_lookahead.engine.paths import Paths, follow

SIZE = 5
PIECES = ["<s>", "ab", "a", "b", "abab", "c"]


def chain(root: int, tokens: list[int]) -> list[Node]:
    nodes = [Node(root, -1, 0, ROOT)]
    return nodes + [Node(t, i, i + 1, CANDIDATE) for i, t in enumerate(tokens)]


def test_chains_follow_paths() -> None:
    """From where the root is on the path; a chain that says more of it stays."""
    draw = random.Random(4)
    trees, rows, paths, expected = [], [], [], []
    for _ in range(3000):
        root, position, most = draw.randrange(3), draw.randint(3, 9), draw.randint(1, 5)
        own = draw.choices(range(3), k=draw.randint(0, SIZE - 1))
        start = position + draw.randint(-3, 2)
        path = draw.choices(range(3), k=draw.randint(0, 7))
        at = position - start
        is_on = at == -1 or (0 <= at < len(path) and path[at] == root)
        rest = path[at + 1 :][: min(most, SIZE) - 1] if is_on else []
        trees.append(chain(root, own))
        rows.append((position, root, most))
        paths.append((start, path))
        expected.append(chain(root, own if own[: len(rest)] == rest else rest))
    position, root, most = torch.tensor(rows, dtype=torch.int32).unbind(1)
    given = DraftTree.of(trees, SIZE)
    tree = follow(given, position, root, most[:, None], Paths.of(paths, "cpu"))
    assert tree.nodes() == expected
    assert sum(a != b for a, b in zip(expected, trees, strict=True)) > 500
    for column in vars(tree).values():
        assert column.dtype == torch.int32


class Spelling(StructuredOutputGrammar):
    """Has one text, and then a "c"."""

    def __init__(self, text: str) -> None:
        self.texts = [text]

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            text = self.texts[-1]
            if not text.startswith(PIECES[token]):
                return False
            self.texts.append(text.removeprefix(PIECES[token]))
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        before = len(self.texts)
        self.accept_tokens("", tokens)
        accepted = len(self.texts) - before
        del self.texts[before:]
        return tokens[:accepted]

    def rollback(self, num_tokens: int) -> None:
        del self.texts[-num_tokens:]

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Not asked for."""

    def is_terminated(self) -> bool:
        return not self.texts[-1]

    def reset(self) -> None:
        """Not asked for."""


class Tokenizer:
    """Takes the longest piece."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(PIECES[t] for t in tokens)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        tokens = []
        while text:
            piece = max(filter(text.startswith, PIECES), key=len)
            tokens.append(PIECES.index(piece))
            text = text.removeprefix(piece)
        return tokens


class FakeRequest(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, text: str, salt: str | None = None) -> None:
        super().__init__(request_id="r", cache_salt=salt, all_token_ids=[0])
        self.structured_output_request = SimpleNamespace(grammar=Spelling(text))

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def say(self, *pieces: str) -> None:
        tokens = [PIECES.index(piece) for piece in pieces]
        assert self.structured_output_request.grammar.accept_tokens("r", tokens)
        self.all_token_ids += tokens


def pieces(tokens: list[int]) -> list[str]:
    return [PIECES[token] for token in tokens]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> ForcedTokens:
    monkeypatch.setattr(forced, "forced_text", lambda grammar: grammar.texts[-1])
    manager: Any = SimpleNamespace(
        tokenizer=Tokenizer(),
        _get_constraint_bounds=lambda request, drafts: (0, 0),
    )
    return ForcedTokens(manager, most=4)


def test_forced_text_is_spelled_as_before(known: ForcedTokens) -> None:
    """By the tokenizer at first; then as the model did, but under another salt."""
    first = FakeRequest("abababc")
    assert pieces(known.after(first, [])) == ["abab", "ab", "c"]
    first.say("ab")
    assert pieces(known.after(first, [])) == ["abab", "c"]
    first.say("a", "b", "ab")
    assert pieces(known.after(first, [])) == ["c"]
    second = FakeRequest("abababc")
    assert pieces(known.after(second, [])) == ["ab", "a", "b", "ab"]
    assert pieces(known.after(FakeRequest("abababc", "salt"), [])) == [
        "abab",
        "ab",
        "c",
    ]


def test_forced_text_after_drafts(known: ForcedTokens) -> None:
    """The grammar is where it was; what was not said teaches nothing."""
    request = FakeRequest("abababc")
    drafts = [PIECES.index("a"), PIECES.index("b")]
    assert pieces(known.after(request, drafts)) == ["abab", "c"]
    assert request.structured_output_request.grammar.texts == ["abababc"]
    request.say("ab", "ab", "ab")
    known.after(request, [])
    assert not known.taken
    assert known.after(request, [PIECES.index("c")]) == []


def test_nothing_is_forced_while_a_request_reasons(known: ForcedTokens) -> None:
    known.manager._get_constraint_bounds = lambda request, drafts: (  # type: ignore
        len(drafts) + 1,
        len(drafts) + 1,
    )
    assert known.after(FakeRequest("abababc"), []) == []
