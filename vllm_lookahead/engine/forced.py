# SPDX-License-Identifier: Apache-2.0
"""Tokens that a grammar leaves no choice about: drafts that only the scheduler knows.

A grammar says which text must come next ("jump-forward decoding": Zheng et al. 2024,
"SGLang: Efficient Execution of Structured Language Model Programs"). Which tokens the
model spells it with is a guess, verified as any draft: those that it took before, else
the tokenizer's.
"""

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

from cachetools import LRUCache
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

# Tokens before a text by which the tokenizer knows how it is spelled.
_CONTEXT = 4
# Characters ahead by which a token is known again, and how many such places are kept.
_AHEAD, _PLACES = 8, 1 << 16


class _Forced(NamedTuple):
    """A text that must come after some drafts, which are tokens from `start` on."""

    start: int
    drafts: list[int]
    text: str


class ForcedTokens:
    def __init__(self, manager: StructuredOutputManager, most: int) -> None:
        """
        Args:
            manager: of the grammars; vLLM's, with its tokenizer.
            most: tokens to look ahead.
        """
        self.manager, self.most = manager, most
        # By cache salt, token before and text ahead: the token that the model took.
        self.taken: LRUCache[tuple[str | None, int, str], int] = LRUCache(_PLACES)
        self._last: WeakKeyDictionary[Request, _Forced] = WeakKeyDictionary()
        self._encode = lru_cache(4096)(self._encode_after)
        self._text = lru_cache(1 << 16)(self._text_after)

    def after(self, request: Request, drafts: list[int]) -> list[int]:
        """What must follow.

        Args:
            request: with a grammar, which has seen all of its tokens.
            drafts: that come before; the grammar accepts them.

        Returns:
            Tokens, as many as the grammar accepts one after the other; none while the
            request reasons, or if the grammar's backend does not say.
        """
        self._learn(request)
        structured = request.structured_output_request
        grammar = structured.grammar if structured else None
        if not isinstance(grammar, StructuredOutputGrammar):
            return []
        start, _ = self.manager._get_constraint_bounds(request, drafts)
        if start > len(drafts):
            return []
        advanced, tokens = 0, []
        for token in drafts[start:]:
            if grammar.is_terminated():
                break
            if not grammar.accept_tokens(request.request_id, [token]):
                break
            advanced += 1
        is_after = advanced == len(drafts[start:]) and not grammar.is_terminated()
        if is_after and (text := forced_text(grammar)):
            before = (*request.all_token_ids[-_CONTEXT:], *drafts)[-_CONTEXT:]
            tokens = self._spell(request.cache_salt, before, text)
            tokens = grammar.validate_tokens(tokens)
            self._last[request] = _Forced(request.num_tokens, drafts, text)
        if advanced:
            grammar.rollback(advanced)
        return tokens

    def _spell(self, salt: str | None, before: tuple[int, ...], text: str) -> list[int]:
        """Tokens of a text, at most so many, by what they follow."""
        tokens: list[int] = []
        usual: list[int] = []
        while text and len(tokens) < self.most:
            token = self.taken.get((salt, before[-1], text[:_AHEAD]))
            if token is None:
                usual = usual or self._encode(before, text)
                token = usual[0]
            usual = usual[1:] if usual and usual[0] == token else []
            piece = self._text(before[-1], token)
            if not piece:
                break
            tokens.append(token)
            text = text[len(piece) :] if text.startswith(piece) else ""
            before = (*before, token)[-_CONTEXT:]
        return tokens

    def _learn(self, request: Request) -> None:
        """How the model spelled the text that it had to say since."""
        if (last := self._last.get(request)) is None:
            return
        known, text = request.all_token_ids, last.text
        at = last.start + len(last.drafts)
        if at >= request.num_tokens:
            return
        del self._last[request]
        if known[last.start : at] != last.drafts:
            return
        for before, token in zip(known[at - 1 :], known[at:], strict=False):
            piece = self._text(before, token)
            if not text or not (text.startswith(piece) or piece.startswith(text)):
                break
            self.taken[request.cache_salt, before, text[:_AHEAD]] = token
            text = text[len(piece) :]

    def _encode_after(self, before: tuple[int, ...], text: str) -> list[int]:
        """The tokenizer's tokens of a text that follows given ones."""
        tokenizer = self.manager.tokenizer
        start = tokenizer.decode(before)
        ahead = tokenizer.encode(start, add_special_tokens=False)
        whole = tokenizer.encode(start + text, add_special_tokens=False)
        if whole[: len(ahead)] == ahead:
            return whole[len(ahead) :]
        # Its beginning is spelled together with what precedes it, by now otherwise.
        return tokenizer.encode(text, add_special_tokens=False)

    def _text_after(self, before: int, token: int) -> str:
        """What a token adds to the text; decoders may drop a space at the start."""
        decode = self.manager.tokenizer.decode
        return decode([before, token]).removeprefix(decode([before]))


def forced_text(grammar: StructuredOutputGrammar) -> str:
    """The text that a grammar's state leaves no choice about."""
    match grammar:
        case XgrammarGrammar():
            return grammar.matcher.find_jump_forward_string()
        case GuidanceGrammar():
            return grammar.ll_matcher.compute_ff_bytes().decode(errors="ignore")
    return ""
