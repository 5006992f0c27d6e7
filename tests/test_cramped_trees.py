# SPDX-License-Identifier: Apache-2.0
"""Trees of a K/V cache that is full."""

from pathlib import Path

import pytest
from vllm.model_executor.models import registry

from tests.hf_config import write_config
from tests.scheduling import BLOCK, Driver, N, T
from vllm_lookahead.engine import support


@pytest.mark.parametrize("worker", [support.V1_WORKER, support.V2_WORKER])
def test_nobody_is_preempted_for_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    driver = Driver(write_config(tmp_path, max_position_embeddings=65536), worker)
    pool = driver.scheduler.kv_cache_manager.block_pool
    ids = driver.add(20, 2)
    driver.step()
    whole = -(-(20 + T) // BLOCK)
    free = whole - driver.blocks(ids[0])  # of one tree of the two
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - free)

    output = driver.step()

    assert output.num_scheduled_tokens == {name: N for name in ids}
    assert output.max_nodes == {ids[0]: T, ids[1]: N}
    assert [driver.blocks(name) for name in ids] == [whole, 2]
    pool.free_blocks(taken)
    assert driver.step().max_nodes == dict.fromkeys(ids, T)
