# SPDX-License-Identifier: Apache-2.0
"""The model's bigrams of the tokens that a set of recorded requests may meet."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.simulate.record import Model, Record
from vllm_lookahead.core.bigrams import NUM_SUCCESSORS
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
    model: Model, records: list[Record], file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Tables as `core.bigrams.model_bigrams`, from the file as far as it has them.

    Tokens that the records do not meet have no bigrams: asking for a whole vocabulary
    would take a CPU longer than the measurement.
    """
    shape = model.vocab_size, NUM_SUCCESSORS
    ids, logits = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.float32)
    if file.exists():
        with np.load(file) as tables:
            ids, logits = tables["ids"], tables["logits"]
    missing = [t for t in sorted(tokens_of(records)) if ids[t, 0] == EMPTY]
    if not missing:
        return ids, logits
    for chunk in torch.tensor(missing).split(_CHUNK):
        answers = model.model(chunk[:, None], use_cache=False).logits[:, -1]
        values, likeliest = answers.topk(NUM_SUCCESSORS)
        ids[chunk.numpy()] = likeliest.int().numpy()
        logits[chunk.numpy()] = values.log_softmax(-1).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".tmp.npz")
    np.savez(whole, ids=ids, logits=logits)
    whole.replace(file)  # others may be reading it
    return ids, logits
