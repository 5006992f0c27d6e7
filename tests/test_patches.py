# SPDX-License-Identifier: Apache-2.0
"""Upstream still has the shape that each patch relies on."""

import dataclasses
import inspect
from typing import Any, get_args

import vllm
from vllm import SamplingParams
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_lookahead.engine import patches
from vllm_lookahead.engine.config import LookaheadConfig
from vllm_lookahead.engine.options import ALIASES
from vllm_lookahead.engine.patches import (
    async_methods,
    generate,
    sampler_warmups,
    validate_spec_decode,
)
from vllm_lookahead.params import OPTIONS


def original(owner: Any, name: str) -> Any:
    """What the plugin found there, or will find."""
    found = vars(owner)[name]
    return inspect.unwrap(getattr(found, "__func__", found))


def parameters(owner: Any, name: str) -> list[str]:
    return list(inspect.signature(original(owner, name)).parameters)


def test_targets_exist() -> None:
    load_general_plugins()
    assert not set(patches.names(vllm.__version_tuple__)) - patches._installed
    for patch in (async_methods, generate, sampler_warmups, validate_spec_decode):
        owner, name = patches.upstream(patch.TARGET)
        assert name in vars(owner)


def test_engine_args() -> None:
    assert isinstance(vars(EngineArgs)["add_cli_args"], staticmethod)
    assert parameters(EngineArgs, "add_cli_args") == ["parser"]
    assert isinstance(vars(EngineArgs)["from_cli_args"], classmethod)
    assert parameters(EngineArgs, "from_cli_args") == ["cls", "args"]
    assert parameters(EngineArgs, "create_speculative_config") == [
        "self",
        "target_model_config",
        "target_parallel_config",
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    unset = {name: None for name in [*ALIASES, "speculative_config", "scheduler_cls"]}
    assert defaults | unset | {"worker_cls": "auto"} == defaults


def test_the_scheduler_is_named_after_the_config_is_made() -> None:
    source = inspect.getsource(EngineArgs.create_engine_config)
    assert source.index("create_speculative_config(") < source.index("SchedulerConfig(")


def test_the_scheduler_can_leave_room_for_trees() -> None:
    source = inspect.getsource(Scheduler.schedule)
    assert "token_budget = self.max_num_scheduled_tokens" in source
    assert source.count("allocate_slots(") == 2
    assert source.count("num_lookahead_tokens=") == 2
    assert "num_lookahead_tokens" in parameters(KVCacheManager, "allocate_slots")


def test_the_cpu_platform_turns_async_scheduling_off() -> None:
    assert parameters(EngineArgs, "create_engine_config")[0] == "self"
    assert EngineArgs.async_scheduling is None
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert "scheduler_config.async_scheduling = False" in source


def test_upstream_has_no_options_of_these_names() -> None:
    parser = original(EngineArgs, "add_cli_args")(FlexibleArgumentParser())
    flags = parser._option_string_actions
    assert not [f for f in flags if f == "--speculative" or f.startswith("--lookahead")]
    assert flags["--speculative-config"].dest == "speculative_config"
    assert flags["--speculative-config"].type('{"a": 1}') == {"a": 1}
    assert flags["--spec-method"].dest == "spec_method"
    assert "ngram" in flags["--spec-method"].choices


def test_the_allow_list_decides_on_async_scheduling() -> None:
    from vllm.config import vllm as upstream

    assert get_args(upstream.NgramGPUTypes) == ("ngram_gpu", "lookahead")
    assert "get_args(NgramGPUTypes)" in inspect.getsource(VllmConfig.__post_init__)


def test_requests_are_validated_where_they_arrive() -> None:
    assert parameters(SamplingParams, "_validate_spec_decode") == [
        "self",
        "speculative_config",
    ]
    assert "self._validate_spec_decode(spec" in inspect.getsource(SamplingParams.verify)
    assert "params.verify(" in inspect.getsource(InputProcessor._validate_params)
    upstream = original(AsyncLLM, "generate")
    assert inspect.isasyncgenfunction(upstream)
    assert parameters(AsyncLLM, "generate")[:3] == ["self", "prompt", "sampling_params"]


def test_the_config_adds_the_sizes() -> None:
    upstream = {field.name for field in dataclasses.fields(SpeculativeConfig)}
    assert {"method", "num_speculative_tokens"} <= upstream
    own = {field.name for field in dataclasses.fields(LookaheadConfig)} - upstream
    assert own == {*OPTIONS, "asks_for_branches", "ranks_nodes"}


def test_model_kinds_can_be_told_apart() -> None:
    asked = "is_encoder_decoder is_diffusion is_attention_free is_hybrid"
    asked += " has_inner_state use_mla uses_mrope uses_alibi get_sliding_window"
    asked += " is_moe rswa_window"
    assert not [name for name in asked.split() if not hasattr(ModelConfig, name)]
    assert hasattr(ParallelConfig, "use_ubatching")
