# SPDX-License-Identifier: Apache-2.0
"""The n-gram pool: what the pages say may follow the root.

Two sources, one ranking. The history (prompt and output) holds an n-gram at every
position; the rings hold what the Jacobi window found. An entry whose preceding
tokens also agree with the request's suffix beats one that agrees on the key
alone; between equals the newest wins.
"""

from vllm_lookahead.core.batch import Request
from vllm_lookahead.core.pages import EMPTY, BlockPages

# Tokens before the key that are compared; a ring entry stores one.
MAX_CONTEXT = 8
# Entries looked at per candidate wanted: many continue the same way.
ENTRIES_PER_CANDIDATE = 4


def lookup(pages: BlockPages, request: Request, max_candidates: int) -> list[list[int]]:
    """The best distinct continuations of a request's root.

    Args:
        pages: the pool; blocks up to that of position p-1 are read.
        request: its N bounds the length of a chain.
        max_candidates: G of the server.

    Returns:
        At most the request's G chains of 1 to N-1 tokens, best first.
    """
    chains: list[list[int]] = []
    found = _entries(pages, request)[: max_candidates * ENTRIES_PER_CANDIDATE]
    for values in found:
        known = any(values == earlier[: len(values)] for earlier in chains)
        if values and not known and len(chains) < request.verification_set_size:
            chains.append(values)
    return chains


def _entries(pages: BlockPages, request: Request) -> list[list[int]]:
    """Every continuation of the root that the pages know, best first."""
    p, n, size = request.position, request.ngram_size, pages.block_size
    text = [*pages.history(request), request.root]
    # (agreement, then what is larger the newer an entry is), values
    found: list[tuple[tuple[int, ...], list[int]]] = []
    for at in range(p):
        if text[at] != request.root:
            continue
        agreement = 0
        while (
            agreement < min(MAX_CONTEXT, at)
            and text[at - 1 - agreement] == text[p - 1 - agreement] != EMPTY
        ):
            agreement += 1
        values = until_empty(text[at + 1 : at + n])
        found.append(((agreement, at // size, 1, at), values))
    for logical in range(-(-p // size)):
        for order, (before, key, *values) in enumerate(
            pages.ngrams(request.blocks[logical])
        ):
            if key == request.root:
                agreement = int(before == text[p - 1] != EMPTY)
                values = until_empty(values[: n - 1])
                found.append(((agreement, logical, 0, order), values))
    found.sort(reverse=True)
    return [values for _, values in found]


def until_empty(tokens: list[int]) -> list[int]:
    """A chain ends at the first token that is not known."""
    return tokens[: [*tokens, EMPTY].index(EMPTY)]
