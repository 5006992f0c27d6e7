# SPDX-License-Identifier: Apache-2.0
"""What requests read of others' blocks, in either engine."""

from typing import Any


class WatchedCorpus:
    """Watches a model runner's corpus.

    Attributes:
        read: of each request, by name, the tokens of each block that stood before its
            text, every text once.
    """

    def __init__(self, runner: Any) -> None:
        drafter = getattr(runner, "tree_drafter", None) or runner.speculator
        corpus = drafter.corpus
        self.read: dict[str, list[list[int]]] = {}
        behind_others = corpus.behind_others

        def watched(batch: Any, request_ids: list[str]) -> Any:
            result = behind_others(batch, request_ids)
            tables = result[0].block_table.tolist()
            counts = (result[1] // corpus.pages.block_size).tolist()
            for request_id, table, count in zip(
                request_ids, tables, counts, strict=True
            ):
                seen = self.read.setdefault(request_id.split("-")[0], [])
                for tokens in corpus.pages.tokens[table[:count]].tolist():
                    known = [token for token in tokens if token >= 0]
                    if known not in seen:
                        seen.append(known)
            return result

        corpus.behind_others = watched
