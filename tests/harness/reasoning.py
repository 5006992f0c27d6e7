# SPDX-License-Identifier: Apache-2.0
"""A reasoning parser for the tokenizer of `make_model`, as a user would plug it in."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("until_at")
class UntilAt(BaseThinkingReasoningParser):
    start_token = "<"
    end_token = "@"
