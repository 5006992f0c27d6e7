# SPDX-License-Identifier: Apache-2.0
"""A script as a user would write it: `AsyncLLM`, requests that come and go.

Given the engine's arguments as JSON, it prints what came out as JSON, in a line.
"""

import asyncio
import json
import sys
from typing import Any

from offline import PROMPTS  # type: ignore[import-not-found]


async def serve(options: dict[str, Any]) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def stream(
        name: str, prompt: str, at_most: int = 1000, **extra: int
    ) -> tuple[list[int], int]:
        """Tokens of a request, and the pieces they came in; dropped after some."""
        params = SamplingParams(
            temperature=0.8,
            seed=3,
            max_tokens=40,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        tokens, pieces = [], 0
        async for output in engine.generate(prompt, params, name):
            tokens += output.outputs[0].token_ids
            pieces += 1
            if pieces == at_most:
                break
        return tokens, pieces

    async def together(name: str, **extra: int) -> list[tuple[list[int], int]]:
        jobs = [stream(f"{name}-{i}", p, **extra) for i, p in enumerate(PROMPTS)]
        return await asyncio.gather(*jobs)

    refused = ""
    try:
        await stream("bad", PROMPTS[0], lookahead_ngram_size=99)
    except ValueError as error:
        refused = str(error)
    await stream("dropped", PROMPTS[0], at_most=3)
    results = {
        "refused": refused,
        "on": await together("on"),
        "off": await together("off", lookahead=0),
    }
    engine.shutdown()
    return results


if __name__ == "__main__":
    print(json.dumps(asyncio.run(serve(json.loads(sys.argv[1])))), flush=True)
