# SPDX-License-Identifier: Apache-2.0
"""The kernels of a lookahead step other than attention, each as a call."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.engine.v2.trees import Plan, StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.index import IndexTables, file_contexts
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.ops import TritonOps

VOCAB = 5000
LLAMA = 4096, 32000  # hidden size and vocabulary of Llama-2-7B
Calls = dict[str, Callable[[], object]]


def text(*shape: int, device: str, vocab: int = VOCAB) -> torch.Tensor:
    """Tokens as frequent as words are: the n-th most common, one in n."""
    weight = 1 / torch.arange(1.0, vocab + 1, device=device)
    count = torch.Size(shape).numel()
    return torch.multinomial(weight, count, replacement=True).int().view(shape)


def make_state(
    params: LookaheadParams,
    requests: int,
    context: int,
    max_context: int,
    block_size: int,
    device: str,
) -> tuple[BlockPages, RequestBatch]:
    """Requests in the middle of a generation, the last half of the text harvested.

    Args:
        max_context: what the block table has columns for: the model's length.
    """
    per_request = (context + params.max_tree_size) // block_size + 1
    num_blocks = requests * per_request
    pages = BlockPages.allocate(num_blocks, block_size, params, device)
    pages.tokens.copy_(text(*pages.tokens.shape, device=device))
    table = torch.randperm(num_blocks, device=device).view(requests, per_request)
    if params.verification_set_size:
        pages.answers.copy_(text(*pages.answers.shape, device=device))
        pages.answer_count.fill_(pages.answers.shape[1])
    if params.window_size:
        harvested = table[:, per_request // 2 :]
        ring = pages.ring[harvested]
        pages.ring[harvested] = text(*ring.shape, device=device)
        pages.ring_count[harvested] = ring.shape[-2]
        pages.window.copy_(text(*pages.window.shape, device=device))

    def column(value: int) -> torch.Tensor:
        return torch.full((requests,), value, dtype=torch.int32, device=device)

    width = (max_context + params.max_tree_size) // block_size + 1
    batch = RequestBatch(
        block_table=torch.nn.functional.pad(table.int(), (0, width - per_request)),
        position=column(context),
        root=text(requests, device=device),
        window_size=column(params.window_size),
        ngram_size=column(params.ngram_size),
        verification_set_size=column(params.verification_set_size),
        max_nodes=column(params.max_tree_size),
    )
    return pages, batch


def accept_a_branch(tree: DraftTree, b: int, sampled: torch.Tensor) -> None:
    """Have the model say the branch of which most K/V must move.

    Args:
        tree: host tensors.
        sampled: [T] int64, out, of request b.
    """
    parents, depths = tree.parents[b].tolist(), tree.depths[b].tolist()
    kinds, count = tree.kinds[b].tolist(), int(tree.num_nodes[b])
    moved = [0] * count
    for i in range(1, count):
        moved[i] = moved[parents[i]] + (depths[i] < i)
    drafted = [i for i in range(count) if kinds[i] == CANDIDATE]
    node = max(drafted, key=moved.__getitem__, default=0)
    while node > 0:
        sampled[parents[node]] = tree.tokens[b, node]
        node = parents[node]


def num_moved(verdict: Verdict) -> int:
    """Accepted nodes that do not lie at their depths already."""
    at = torch.arange(verdict.path.shape[1], device=verdict.path.device)
    return int(((verdict.path > at) & (at < verdict.num_emitted[:, None])).sum())


def step_calls(
    params: LookaheadParams,
    requests: int,
    context: int,
    max_context: int,
    block_size: int,
    caches: list[torch.Tensor],
    device: str,
) -> tuple[Calls, Calls, int]:
    """Each kernel of a step as a call that can be repeated.

    Args:
        max_context: of the requests that the engine would take.
        caches: [num_blocks, block_size, heads, width] of each layer; compaction
            is left out where they hold fewer blocks than the requests.

    Returns:
        The calls, those of their parts that are looked at by themselves, and how many
        accepted nodes the compaction moves in each layer.
    """
    pages, batch = make_state(
        params, requests, context, max_context, block_size, device
    )
    ops = TritonOps(params, requests, device)
    n, g, t = params.ngram_size, params.verification_set_size, params.max_tree_size
    shape = VOCAB, NUM_SUCCESSORS
    hints = Hints(
        bigrams=torch.randint(0, VOCAB, shape, device=device).int(),
        # Nearly alike, so that trees are bushy and much K/V moves.
        bigram_logprobs=0.01 * torch.randn(shape, device=device),
        temperature=torch.full((requests,), 0.01, device=device),
        seeds=torch.zeros(requests, 1, dtype=torch.int64, device=device),
        noise=gpu_noise,
    )
    tree, _ = ops.draft(pages, batch, hints, g)
    tree = DraftTree(*(column.clone() for column in vars(tree).values()))
    host = torch.full((requests, t), VOCAB)  # a token that nobody drafts
    host_tree = DraftTree(**{name: x.cpu() for name, x in vars(tree).items()})
    for b in range(requests):
        accept_a_branch(host_tree, b, host[b])
    sampled = host.to(device)
    verdict = ops.verify(tree, sampled, n)
    slots = batch.root_slots(block_size) | 1
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * t
    bits = torch.empty(requests, t, -(-t // 32), dtype=torch.int32, device=device)
    positions = torch.empty(requests * t, dtype=torch.int64, device=device)
    input_ids = torch.empty(requests * t, dtype=torch.int32, device=device)
    num_rows = requests * (1 + params.max_candidate_nodes)
    vocab_size = LLAMA[1] if device == "cuda" else 8
    logits = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16, device=device)
    rows = torch.arange(requests, dtype=torch.int32, device=device)
    tokens, logprobs = ops.likeliest_tokens(logits)
    answers = Answers(tokens, logprobs, rows * (1 + params.max_candidate_nodes))
    calls: Calls = {
        "write_tokens": lambda: ops.write_tokens(pages, slots, batch.root),
        "draft": lambda: ops.draft(pages, batch, hints, g),
        "mask": lambda: build_mask(
            tree, batch.position, starts, bits, positions, input_ids
        ),
        "verify": lambda: ops.verify(tree, sampled, n),
        "compact": lambda: ops.compact(caches, batch, verdict, block_size),
        "update": lambda: ops.update(pages, batch, tree, sampled, verdict),
        "likeliest_tokens": lambda: ops.likeliest_tokens(logits),
        "keep_answers": lambda: ops.keep_answers(pages, batch, tree, verdict, answers),
        **engine_calls(params, tree, verdict, context, device),
    }
    if caches[0].shape[0] < pages.tokens.shape[0]:
        del calls["compact"]
    max_tokens = batch.block_table.shape[1] * block_size
    tables = IndexTables.allocate(requests, max_tokens, device)
    parts: Calls = {"index": lambda: file_contexts(pages, batch, tables)}
    return calls, parts, num_moved(verdict)


def engine_calls(
    params: LookaheadParams,
    tree: DraftTree,
    verdict: Verdict,
    context: int,
    device: str,
) -> Calls:
    """What the engine does with trees before and after the core's kernels."""
    requests, t = tree.tokens.shape
    on = torch.device(device)
    sizes = RequestSizes(requests, params)
    for slot in range(requests):
        sizes.add_request(slot, SamplingParams(), chain=False)
    fed = np.full(requests, t, dtype=np.int32)
    index = torch.arange(requests, device=device)
    input_batch = SimpleNamespace(
        num_reqs=requests,
        num_tokens=requests * t,
        num_draft_tokens_per_req=fed - 1,
        num_scheduled_tokens=fed,
        idx_mapping=index,
        idx_mapping_np=np.arange(requests),
        query_start_loc=(torch.arange(requests + 1, device=device) * t).int(),
        seq_lens=(index * 0 + context + t).int(),
        input_ids=torch.zeros(requests * t, dtype=torch.int32, device=device),
    )
    plan = Plan.make(input_batch, sizes, on)
    step = StepTrees(requests, requests * t, params, on)
    slots = WaitingTrees(requests, t, on)
    drafts = torch.zeros(
        requests, params.ngram_size - 1, dtype=torch.int64, device=device
    )
    final_slot = torch.arange(requests * t, device=device)
    last_sampled = torch.zeros(requests, 1, dtype=torch.int64, device=device)

    def feed() -> None:
        step.feed(plan, slots, input_batch, final_slot, last_sampled)

    slots.store(tree, slots.chances, index, drafts)
    feed()
    num_rows, end = int(plan.cu_verified_np[-1]), int(plan.cu_window_np[-1])
    hidden_size, vocab_size = LLAMA if on.type == "cuda" else (8, 8)
    hidden = torch.zeros(requests * t, hidden_size, dtype=torch.bfloat16, device=device)
    refill_logits = torch.zeros(
        end - num_rows, vocab_size, dtype=torch.bfloat16, device=device
    )
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def gather() -> None:
        """The copies around the sampler, and before the next proposal."""
        at = step.row_token[:num_rows]
        hidden[step.row_token[:end]]
        if end > num_rows:
            rows = step.row_node[num_rows:end]
            step.sampled.index_copy_(0, rows, refill_logits.argmax(-1))
        final_slot[at], input_batch.input_ids[at]
        step.sampled.index_copy_(0, step.row_node[:num_rows], tokens)
        verdict.num_emitted.clone(), verdict.tokens.long()
        input_batch.seq_lens[index], last_sampled[index, 0].int()

    return {
        "feed": feed,
        "store": lambda: slots.store(tree, slots.chances, index, drafts),
        "gather": gather,
    }
