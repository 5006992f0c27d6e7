# SPDX-License-Identifier: Apache-2.0
"""The pool scope "salt" in an engine: who owns which block, and who reads which."""

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.corpus import NOBODY, Owners, behind, salt_of
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.outputs import GivenOut
from vllm_lookahead.engine.support import refuse
from vllm_lookahead.params import SALT, LookaheadParams, request_params


def salt_of_request(request: Request, server: LookaheadParams) -> int:
    """Of its blocks: NOBODY if it is off, or asks for its own text only."""
    sampling = request.sampling_params
    params = sampling and request_params(sampling.extra_args, server)
    if params is None or params.pool_scope != SALT:
        return NOBODY
    return salt_of(request.cache_salt)


def given_out(
    output: SchedulerOutput,
    requests: dict[str, Request],
    server: LookaheadParams,
    block_size: int,
) -> GivenOut | None:
    """The blocks that a step gives out; None where nothing is shared.

    Blocks found in the prefix cache stay what they are.

    Args:
        output: vLLM's, of a step just scheduled.
        requests: the scheduler's, by id.
        server: the sizes that the server was started with.
        block_size: tokens of a block.
    """
    if server.pool_scope != SALT:
        return None
    given = GivenOut()
    for new in output.scheduled_new_reqs:
        salt = salt_of_request(requests[new.req_id], server)
        given.of_requests[new.req_id] = salt
        given.add(new.block_ids[0][new.num_computed_tokens // block_size :], salt)
    cached = output.scheduled_cached_reqs
    for request_id, block_ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            resumed = request_id in cached.resumed_req_ids
            found = computed // block_size if resumed else 0
            salt = salt_of_request(requests[request_id], server)
            given.add(block_ids[0][found:], salt)
    return given


class Corpus:
    """What the worker knows of it.

    Attributes:
        pages: of all blocks.
        owners: of all blocks.
        salts: request id -> its salt.
    """

    def __init__(self, pages: BlockPages, is_alone: bool) -> None:
        """
        Args:
            pages: as the attribute.
            is_alone: whether pages ride the only K/V cache, block by block.

        Raises:
            ValueError: they do not.
        """
        refuse({'pool_scope="salt" on a model with several K/V caches': not is_alone})
        self.pages, self.salts = pages, dict[str, int]()
        self.owners = Owners.allocate(len(pages.tokens), pages.tokens.device)

    def update(self, output: Any) -> None:
        """Before a step: blocks are given out, requests come and go.

        Args:
            output: the scheduler's; vLLM's warm-up does without ours.
        """
        for request_id in output.finished_req_ids:
            self.salts.pop(request_id, None)
        given: GivenOut | None = getattr(output, "given_out", None)
        if given is None:
            return
        self.salts |= given.of_requests
        if given.blocks:
            both = self._tensor([given.blocks, given.salts])
            self.owners.give_out(self.pages, *both)

    def behind_others(
        self, batch: RequestBatch, request_ids: list[str]
    ) -> tuple[RequestBatch, torch.Tensor]:
        """The batch with others' newest blocks before each text.

        Args:
            batch: B requests.
            request_ids: [B] theirs.

        Returns:
            batch: to draft with, and nothing else.
            before: [B] int32, tokens of others; see `Hints`.
        """
        salts = self._tensor([self.salts.get(r, NOBODY) for r in request_ids])
        size = self.pages.block_size
        blocks, count = self.owners.others(batch, salts, size)
        return behind(batch, blocks, count, size), count * size

    def _tensor(self, values: list) -> torch.Tensor:
        device = self.pages.tokens.device
        return async_tensor_h2d(values, dtype=torch.int64, device=device)
