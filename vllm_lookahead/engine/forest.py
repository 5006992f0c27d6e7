# SPDX-License-Identifier: Apache-2.0
"""How many nodes of all its trees a step is fed: as many as are worth their time.

The nodes of a batch are ranked together by their chance; a child is never likelier than
its parent, so the best of them are trees. How many are fed is chosen here, by the
scheduler, from the chances of an earlier step: tokens expected of the step over the
time that a step of so many tokens takes. Which nodes they are is the device's to know
(`triton_kernels/rank.py`), from the chances of this step. Neither waits for the other,
and with tensor parallelism all ranks are told the same number.
"""

from collections.abc import Iterable, Sequence

import numpy as np

Curve = list[tuple[int, float]]


class Forest:
    """What is known of a batch's trees and of a step's time.

    Attributes:
        step_ms: [max_num_tokens+1] float64, time of a step by its tokens; None before
            it was measured: then every node is fed that there is room for.
    """

    def __init__(self, max_num_reqs: int, max_num_tokens: int, most_nodes: int) -> None:
        """
        Args:
            max_num_reqs, max_num_tokens: of a step.
            most_nodes: of a tree beside its root.
        """
        self.limits = max_num_reqs, max_num_tokens
        self.step_ms: np.ndarray | None = None
        self._rows: dict[str, int] = {}
        self._chances = np.zeros((0, most_nodes), dtype=np.float32)
        # Of a request that nothing is known of yet.
        self._typical = np.zeros(most_nodes, dtype=np.float32)

    def learn_times(self, curve: Curve, graph_limit: int) -> None:
        """Take what was measured.

        Args:
            curve: tokens and milliseconds, ascending.
            graph_limit: tokens of the largest CUDA graph; 0 without graphs.
        """
        from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
            build_cost_tables_from_curves,
        )

        nothing: Curve = [(0, 0.0)]
        tables = build_cost_tables_from_curves(
            nothing, curve, *self.limits, graph_limit
        )
        self.step_ms = tables[1]

    def learn_chances(
        self, request_ids: Sequence[str | None], chances: np.ndarray
    ) -> None:
        """Take those of the trees that a step drafted.

        Args:
            request_ids: of each row; None where no tree was drafted.
            chances: [rows, most_nodes] float32, falling in each row.
        """
        assert chances.shape[1] == len(self._typical), "a root has no chance"
        rows = {name: i for i, name in enumerate(request_ids) if name is not None}
        if rows:
            self._rows, self._chances = rows, chances
            self._typical = chances[list(rows.values())].mean(0)

    def ranked(self, most: Iterable[tuple[str, int]]) -> np.ndarray:
        """Chances of all nodes of a batch, falling.

        Args:
            most: id of each request that drafts, and nodes beside the root that its
                tree may have.
        """
        rows = []
        for name, nodes in most:
            row = self._rows.get(name)
            known = self._typical if row is None else self._chances[row]
            rows.append(known[:nodes])
        return np.sort(np.concatenate(rows or [self._typical[:0]]))[::-1]

    def best(self, chances: np.ndarray, tokens: int, emitting: int) -> int:
        """How many of the likeliest nodes make the most tokens a second.

        Args:
            chances: of the nodes, falling: as many as there is room for.
            tokens: fed beside them.
            emitting: requests of the step that say a token without any node.
        """
        if self.step_ms is None:
            return len(chances)
        emitted = emitting + np.cumsum(chances, dtype=np.float64)
        emitted = np.concatenate(([emitting], emitted))
        return int(np.argmax(emitted / self.step_ms[tokens : tokens + len(emitted)]))
