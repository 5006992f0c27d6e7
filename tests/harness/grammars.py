# SPDX-License-Identifier: Apache-2.0
"""What requests with a grammar do on both engines."""

import json
import re
from typing import Any

import pytest

from tests.harness.engines import Engines
from tests.harness.environment import HERE
from tests.harness.jobs import (
    ACCEPTED,
    DRAFTED,
    DRAFTS,
    prompts,
    request,
    same_as_plain,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "customer": {"enum": ["Anna Berg", "Luis Ortega"]},
        "is_paid": {"type": "boolean"},
    },
    "required": ["customer", "is_paid"],
}
EBNF = 'root ::= "from " place " to " place\nplace ::= "Bergen" | "Toledo" | "Graz"'
REGEX = "[ab]{3}(cdefgh|efghij){2,4}"
CHOICE = ["yes, indeed", "yes or no", "no"]
OFF = {"lookahead": 0}
N = 5
CHAINS = {"window_size": 0, "ngram_size": N, "verification_set_size": 4}
BACKENDS = ["xgrammar", "guidance"]


def cases(*always: tuple[str, bool]) -> list[Any]:
    """Backend, and whether steps are scheduled ahead: some, and slowly the others."""
    others = [(b, ahead) for b in BACKENDS for ahead in (False, True)]
    slow = [pytest.param(*c, marks=pytest.mark.slow) for c in others if c not in always]
    return [*always, *slow]


def options_of(backend: str, ahead: bool, **more: Any) -> dict[str, Any]:
    config = {"backend": backend, "disable_any_whitespace": True, **more}
    return {"structured_outputs_config": config, "async_scheduling": ahead}


def kinds_of_grammar(
    engines: Engines, backend: str, ahead: bool, sizes: dict[str, int] = CHAINS
) -> None:
    """Each beside others and beside trees, greedy and seeded, and one switched off."""
    text = prompts(1, seed=10)[0]
    own: dict[str, Any] = {"ignore_eos": False, "max_tokens": 60}
    seeded = {"temperature": 0.8, "seed": 3}
    off = {"extra_args": OFF}
    jobs = [
        [
            request(text, json=SCHEMA, **own),
            request(text, max_tokens=30),
            request(text, regex=REGEX, **own, **seeded),
            request(text, choice=CHOICE, **own),
        ],
        [
            request(text, grammar=EBNF, **own, **seeded),
            request(text, json=SCHEMA, **own, **seeded),
            request(text, max_tokens=30, **seeded),
            request(text, json=SCHEMA, **own, **off),
        ],
        # Goes on freely once the grammar has ended; another ends amid it.
        [
            request(text, regex="abcdefghij", max_tokens=20),
            request(text, regex="abcdefghij", max_tokens=6),
            request(text, regex=REGEX, repetition_penalty=1.2, logprobs=1, **own),
        ],
    ]
    result = same_as_plain(engines, jobs, sizes, **options_of(backend, ahead))
    texts = [output["text"] for output in result["outputs"]]
    for i in (0, 5, 7):
        assert json.loads(texts[i])["customer"] in ("Anna Berg", "Luis Ortega")
    assert re.fullmatch(REGEX, texts[2]) and texts[3] in CHOICE
    assert texts[4].startswith("from ")
    assert ("Async" in result["scheduler"]) == ahead
    metrics = result["metrics"]
    assert metrics[ACCEPTED] > 60
    assert metrics[ACCEPTED] <= metrics[DRAFTED] <= (N - 1) * metrics[DRAFTS]


def forced_text_is_drafted(engines: Engines, backend: str, ahead: bool) -> None:
    """All of it: 24 tokens, the first of which comes of the prefill, and the end."""
    wanted = request([5, 6, 7], regex="(abcdefgh){3}", max_tokens=40, ignore_eos=False)
    off = request(**{**wanted["params"], "prompt": [5, 6, 7], "extra_args": OFF})
    options = options_of(backend, ahead)
    result = same_as_plain(engines, [[wanted]], CHAINS, **options)
    assert result["outputs"][0]["text"] == "abcdefgh" * 3
    # Four steps of N tokens, then the last three and the end of the text.
    metrics = result["metrics"]
    assert metrics[ACCEPTED] == metrics[DRAFTED] == 4 * (N - 1) + 3
    assert metrics[DRAFTS] == 5
    assert not same_as_plain(engines, [[off]], CHAINS, **options)["metrics"][DRAFTS]


def a_grammar_after_reasoning(engines: Engines, backend: str, ahead: bool) -> None:
    """It holds from where the reasoning ends, be that within a chain."""
    start, end = ord("<") - 30, ord("@") - 30
    # Whatever comes, the end of the reasoning is drafted after it.
    text = [token for t in range(40, 95) for token in (t, end, start)]
    own = {"max_tokens": 60, "ignore_eos": False, "regex": REGEX}
    often = {"logit_bias": {end: 2.5}}
    jobs = [
        [request(text, **own, **often, temperature=0.8, seed=i) for i in range(4)],
        [request([*text, 40, end, 40, end], **own), request(text, **own, **often)],
    ]
    plugin = str(HERE / "reasoning.py")
    options = options_of(
        backend, ahead, reasoning_parser="until_at", reasoning_parser_plugin=plugin
    )
    result = same_as_plain(engines, jobs, CHAINS, **options)
    ended = 0
    for output in result["outputs"]:
        reasoning, at, answer = output["text"].partition("@")
        if at and output["reason"] == "stop":
            ended += bool(reasoning)
            assert re.fullmatch(REGEX, answer)
    assert ended > 1
    assert result["metrics"][ACCEPTED] > 40
