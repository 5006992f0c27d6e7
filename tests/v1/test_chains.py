# SPDX-License-Identifier: Apache-2.0
"""One chain per step, on vLLM's own attention of every kind: plain vLLM's tokens."""

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, request
from tests.harness.kinds import CHAIN, EVERY_KIND, MORE_MODELS, mixed_jobs, tight

slow = [pytest.param(name, marks=pytest.mark.slow) for name in MORE_MODELS]


@pytest.mark.parametrize("name", [*EVERY_KIND, *slow])
def test_same_as_plain(engines: Engines, name: str) -> None:
    """In prompts read in parts, with shared prefixes, preempted, on and off.

    Plain vLLM 0.32 ends with an error on a CPU where a seeded prompt comes in parts, so
    it gets room enough.
    """
    options = {**EVERY_KIND, **MORE_MODELS}[name]
    jobs = mixed_jobs(6, max_tokens=40)
    roomy = {"max_model_len": 256, "max_num_batched_tokens": 1024}
    plain = engines.run(jobs, model=[name], **roomy, **options)["outputs"]
    result = engines.run(jobs, CHAIN, model=[name], **tight(name), **options)
    assert [o["tokens"] for o in result["outputs"]] == [o["tokens"] for o in plain]
    assert result["metrics"][ACCEPTED] > 0
    assert result["metrics"]["vllm:num_preemptions"] > 0
    is_latent = name.startswith("Deepseek")  # vLLM reads its prompts whole on a CPU
    assert (result["chunks"][0] > 0) is not is_latent
    cached = [o["cached"] for o in result["outputs"]]
    assert any(cached[-6:]) is not is_latent
    assert result["usage"] == [0, 0, 0]


def test_cache_salt_of_two_caches(engines: Engines) -> None:
    """Blocks of either group are shared under the salt that wrote them, and evicted."""
    name = "GptOssForCausalLM"
    texts = [list(range(i, i + 80)) for i in (2, 12, 15)]
    salts = ["a", "a", "b", None]
    jobs = [[request(texts[0], max_tokens=24, salt=salt)] for salt in salts]
    jobs += [[request(text, max_tokens=24) for text in texts]] * 2
    options = {"model": [name], "max_model_len": 256, "num_gpu_blocks_override": 20}
    plain = engines.run(jobs, **options)["outputs"]
    result = engines.run(jobs, CHAIN, **options)
    assert [o["tokens"] for o in result["outputs"]] == [o["tokens"] for o in plain]
    cached = [o["cached"] for o in result["outputs"]]
    assert cached[1] > 0 and not any(cached[i] for i in (0, 2, 3))
    assert cached == [o["cached"] for o in plain]
    assert result["metrics"][ACCEPTED] > 0
