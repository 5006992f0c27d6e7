# SPDX-License-Identifier: Apache-2.0
"""The model's bigrams of the tokens that a set of recorded requests may meet."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.simulate.protocol import Bigrams
from benchmarks.simulate.record import Model, Record
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.pages import EMPTY

# Of each distribution on plain's path, tokens whose bigrams are asked for.
MOST = 8
_CHUNK = 128


def tokens_of(records: Iterable[Record]) -> set[int]:
    tokens: set[int] = set()
    for record in records:
        tokens.update(record.prompt, record.output, record.ids[:, :MOST].flatten())
    return tokens


@torch.inference_mode()
def load_bigrams(
    model: Model, records: list[Record], prefix: list[int], file: Path
) -> Bigrams:
    """Successors of each token after a prefix, from the file as far as it has them.

    Tokens that the records do not meet have no bigrams: asking for a whole vocabulary
    would take a CPU longer than the measurement.
    """
    shape = model.vocab_size, NUM_SUCCESSORS
    ids, logprobs = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.float32)
    if file.exists():
        with np.load(file) as tables:
            ids, logprobs = tables["ids"], tables["logprobs"]
    missing = [t for t in sorted(tokens_of(records)) if ids[t, 0] == EMPTY]
    if not missing:
        return Bigrams(ids, logprobs)
    for chunk in torch.tensor(missing).split(_CHUNK):
        before = torch.tensor(prefix, dtype=torch.int64).expand(len(chunk), -1)
        fed = torch.cat([before, chunk[:, None]], 1)
        logits = model.model(fed, use_cache=False, logits_to_keep=1).logits[:, -1]
        values, likeliest = logits.log_softmax(-1).topk(NUM_SUCCESSORS)
        ids[chunk.numpy()] = likeliest.int().numpy()
        logprobs[chunk.numpy()] = values.numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".tmp.npz")
    np.savez(whole, ids=ids, logprobs=logprobs)
    whole.replace(file)  # others may be reading it
    return Bigrams(ids, logprobs)
