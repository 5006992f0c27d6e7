# SPDX-License-Identifier: Apache-2.0
"""Fit the weights by which drafts are ranked, `core.draft.best_first.WEIGHTS`.

    python benchmarks/fit_estimate.py --models demo/model --temperatures 0,0.8

Decodes prompts with one chain of drafts per step, as the engine would, and notes for
every node that was reached what each token that might follow had to say for itself,
and which one did follow. The weights are those of the multinomial logistic regression;
printed beside them are the tokens per step with the weights in the code.
"""

import argparse
from pathlib import Path
from typing import Any

import prompts as prompt_sets  # type: ignore[import-not-found]
import torch
from our_lookahead import OurLookahead, ask  # type: ignore[import-not-found]
from tree_model import TreeModel  # type: ignore[import-not-found]

from vllm_lookahead.core.draft.best_first import WEIGHTS, Drafter
from vllm_lookahead.core.draft.noise import gumbel_noise
from vllm_lookahead.params import LookaheadParams

# One chain, as on a CPU.
PARAMS = LookaheadParams(window_size=0, ngram_size=4, verification_set_size=1)
BLOCK_SIZE = 16

# Terms of each token that may follow, and which of them did.
Sample = tuple[torch.Tensor, int]


def decode(
    model: TreeModel,
    prompt: list[int],
    bigrams: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    max_tokens: int,
    seed: int,
) -> tuple[int, list[Sample]]:
    """Steps that `max_tokens` tokens take, and what was known at each node."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (max_tokens + 16,), generator=generator)
    ours = OurLookahead(
        prompt, PARAMS, model, bigrams, BLOCK_SIZE, max_tokens, temperature, seeds
    )
    model.prefill(prompt[:-1])
    samples: list[Sample] = []
    num_steps = 0
    vocab = torch.arange(model.model.config.vocab_size)
    while ours.num_emitted < max_tokens:
        draft, known = ours.propose(), ours.num_emitted
        sampled = model.forward(draft)
        if temperature > 0:
            at = known + torch.tensor(draft.depths)
            noise = gumbel_noise(seeds[at][:, None], vocab)
            scores = model.logits.double() / temperature + noise
            sampled = scores.argmax(-1).tolist()
        if ours.hints is not None:  # a step, and not the prefill
            drafter = Drafter(ours.pages, ours.batch, ours.hints, 0)
        emitted, path = ours.accept(sampled)
        model.keep(path)
        if ours.hints is None:
            continue
        num_steps += 1
        for depth, token in enumerate(emitted[: PARAMS.ngram_size - 1]):
            terms = drafter.terms(emitted[:depth])
            rows = torch.zeros(len(terms) + 1, len(WEIGHTS), dtype=torch.float64)
            rows[-1, -1] = temperature  # any other token
            if terms:
                rows[:-1, :-1] = torch.tensor(list(terms.values()))
            places = {token: i for i, token in enumerate(terms)}
            samples.append((rows, places.get(token, len(terms))))
    return num_steps, samples


def fit(samples: list[Sample]) -> list[float]:
    """Weights of the terms that say most of what did follow."""
    most = max(len(rows) for rows, _ in samples)
    terms = torch.zeros(len(samples), most, len(WEIGHTS), dtype=torch.float64)
    missing = torch.ones(len(samples), most, dtype=torch.bool)
    for i, (rows, _) in enumerate(samples):
        terms[i, : len(rows)], missing[i, : len(rows)] = rows, False
    followed = torch.tensor([at for _, at in samples])
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (terms @ weights).masked_fill(missing, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits, followed)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().tolist()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", default="demo/model", help="any that transformers loads")
    add("--datasets", default=str(Path(__file__).parent / "python_prompts.jsonl"))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--temperatures", default="0,0.8")
    add("--num-prompts", type=int, default=8)
    add("--skip-prompts", type=int, default=0, help="those that others measure with")
    add("--max-tokens", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    from transformers import AutoTokenizer

    args = parse()
    torch.set_num_threads(1)
    every: list[Sample] = []
    head = "".join(f"{name:>10}" for name in WEIGHTS)
    print(f"{'':36}{'S':>6}{'samples':>9}{head}")
    for path in args.models.split(","):
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model = TreeModel(path)
        bigrams = ask(model, tokenizer("")["input_ids"])
        for dataset in args.datasets.split(","):
            most = args.skip_prompts + args.num_prompts
            texts = prompt_sets.load(dataset, args.data_dir, most)[args.skip_prompts :]
            for temperature in map(float, args.temperatures.split(",")):
                steps, samples = 0, list[Sample]()
                for i, text in enumerate(texts):
                    prompt = tokenizer(text)["input_ids"]
                    done = decode(
                        model, prompt, bigrams, temperature, args.max_tokens, i
                    )
                    steps, samples = steps + done[0], samples + done[1]
                every += samples
                name = f"{Path(path).name}, {Path(dataset).stem}, T={temperature}"
                speed = len(texts) * args.max_tokens / steps
                weights = "".join(f"{w:10.2f}" for w in fit(samples))
                print(f"{name:36}{speed:6.2f}{len(samples):9}{weights}", flush=True)
    print(f"{'all':42}{len(every):9}" + "".join(f"{w:10.2f}" for w in fit(every)))
    print(f"{'in the code':51}" + "".join(f"{w:10.2f}" for w in WEIGHTS.values()))


if __name__ == "__main__":
    main()
