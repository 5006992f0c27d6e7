# SPDX-License-Identifier: Apache-2.0
"""Tokens that a grammar leaves no choice about: drafts that only the scheduler knows.

A grammar says which text must come next ("jump-forward decoding": Zheng et al. 2024,
"SGLang: Efficient Execution of Structured Language Model Programs"). Which tokens the
model will spell it with is a guess, the tokenizer's; it is verified as any draft.
"""

from functools import lru_cache

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

# Tokens before a text that say how it is spelled.
_CONTEXT = 4


class ForcedTokens:
    def __init__(self, manager: StructuredOutputManager, most: int) -> None:
        """
        Args:
            manager: of the grammars; vLLM's, with its tokenizer.
            most: tokens to look ahead.
        """
        self.manager, self.most = manager, most
        self._spell = lru_cache(4096)(self._spell_text)

    def after(self, request: Request, drafts: list[int]) -> list[int]:
        """What must follow.

        Args:
            request: with a grammar, which has seen all of its tokens.
            drafts: that come before; the grammar accepts them.

        Returns:
            Tokens, as many as the grammar accepts one after the other; none while the
            request reasons, or if the grammar's backend does not say.
        """
        structured = request.structured_output_request
        grammar = structured.grammar if structured else None
        if not isinstance(grammar, StructuredOutputGrammar):
            return []
        start, _ = self.manager._get_constraint_bounds(request, drafts)
        if start > len(drafts):
            return []
        advanced = 0
        for token in drafts[start:]:
            if grammar.is_terminated():
                break
            if not grammar.accept_tokens(request.request_id, [token]):
                break
            advanced += 1
        tokens: list[int] = []
        is_after = advanced == len(drafts[start:]) and not grammar.is_terminated()
        if is_after and (text := forced_text(grammar)):
            before = (*request.all_token_ids[-_CONTEXT:], *drafts)[-_CONTEXT:]
            tokens = grammar.validate_tokens(self._spell(before, text)[: self.most])
        if advanced:
            grammar.rollback(advanced)
        return tokens

    def _spell_text(self, before: tuple[int, ...], text: str) -> list[int]:
        """Tokens of a text that follows given ones."""
        tokenizer = self.manager.tokenizer
        start = tokenizer.decode(before)
        ahead = tokenizer.encode(start, add_special_tokens=False)
        whole = tokenizer.encode(start + text, add_special_tokens=False)
        if whole[: len(ahead)] == ahead:
            return whole[len(ahead) :]
        # Its beginning is spelled together with what precedes it, by now otherwise.
        return tokenizer.encode(text, add_special_tokens=False)


def forced_text(grammar: StructuredOutputGrammar) -> str:
    """The text that a grammar's state leaves no choice about."""
    match grammar:
        case XgrammarGrammar():
            return grammar.matcher.find_jump_forward_string()
        case GuidanceGrammar():
            return grammar.ll_matcher.compute_ff_bytes().decode(errors="ignore")
    return ""
