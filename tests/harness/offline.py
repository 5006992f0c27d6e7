# SPDX-License-Identifier: Apache-2.0
"""A script as a user would write it: `LLM`, its processes and threads as by default.

Given `LLM`'s options as JSON, it prints what came out as JSON, in a line.
"""

import json
import sys
from typing import Any

PROMPTS = [
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n",
    "import os\nimport sys\n\ndef main():\n",
    "class A:\n    def __init__(self, x):\n        self.x = x\n\nclass B:\n",
]


class WorkerExtension:
    """Counts the steps that `LookaheadExecutor` asks of a worker in one call."""

    execute_and_sample: Any

    def watch(self) -> int:
        import torch

        self.steps = 0
        execute_and_sample = self.execute_and_sample

        def counted(*args: Any) -> Any:
            self.steps += 1
            return execute_and_sample(*args)

        self.execute_and_sample = counted
        return torch.get_num_threads()

    def take_steps(self) -> int:
        return self.steps


def main() -> None:
    from vllm import LLM, SamplingParams

    def texts(requests: list[SamplingParams]) -> list[str]:
        outputs = llm.generate(PROMPTS, requests, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def requests(**extra: int) -> list[SamplingParams]:
        own = {"max_tokens": 40, "ignore_eos": True, "seed": 3, "extra_args": extra}
        return [SamplingParams(temperature=t, **own) for t in (0.0, 0.8, 0.0)]

    llm = LLM(**json.loads(sys.argv[1]), worker_extension_cls="offline.WorkerExtension")
    (threads,) = llm.collective_rpc("watch")
    refused = ""
    try:
        llm.generate(PROMPTS, requests(lookahead_ngram_size=99), use_tqdm=False)
    except ValueError as error:
        refused = str(error)
    result = {
        "refused": refused,
        "on": texts(requests()),
        "off": texts(requests(lookahead=0)),
        "threads": threads,
        "steps": llm.collective_rpc("take_steps")[0],
        "engine_core": type(llm.llm_engine.engine_core).__name__,
        "metrics": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
