# SPDX-License-Identifier: Apache-2.0
import pickle
import re
import subprocess
import sys
from dataclasses import replace as changed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from tests.harness.environment import v2_environment
from tests.hf_config import write_config
from vllm_lookahead.engine import config as engine_config_module
from vllm_lookahead.engine import support
from vllm_lookahead.engine.config import LookaheadConfig, default_params
from vllm_lookahead.params import LookaheadParams


@pytest.fixture(autouse=True)
def _look_at_models_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports a model in a process of its own, which takes seconds."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


def engine_config(model: str, **arguments: Any) -> Any:
    arguments.setdefault("speculative_config", {"method": "lookahead"})
    return EngineArgs(
        model, skip_tokenizer_init=True, **arguments
    ).create_engine_config()


def test_sizes_come_from_the_options() -> None:
    config = LookaheadConfig.from_options(
        {"window_size": 15, "ngram_size": 5, "verification_set_size": 15}
    )
    assert config.params == LookaheadParams(15, 5, 15)
    # The scheduler sees N-1 drafts; the other nodes are the worker's.
    assert config.num_speculative_tokens == 4
    assert config.max_num_new_slots_for_drafting == 0


def test_sizes_left_out_are_the_platforms() -> None:
    assert LookaheadConfig.from_options({}).params == default_params("cpu")
    config = LookaheadConfig.from_options({"method": "lookahead", "ngram_size": 4})
    assert config.params == LookaheadParams(
        default_params("cpu").window_size,
        4,
        default_params("cpu").verification_set_size,
        default_params("cpu").node_budget,
    )
    assert default_params("cuda") == LookaheadParams(0, 9, 32, 64)
    assert LookaheadConfig.from_options({"pool_scope": "salt"}).params == changed(
        default_params("cpu"), pool_scope="salt"
    )
    # A width that is given has the room that it takes.
    config = LookaheadConfig.from_options({"window_size": 5})
    assert config.params.fed_window_size == 5
    config = LookaheadConfig.from_options({"verification_set_size": 9})
    assert config.params.max_candidate_nodes == 9 * 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": 65}, "window_size=65 is not allowed: .* from 0 to 64"),
        ({"ngram_size": "five"}, "ngram_size='five' is not allowed: .* from 2 to 16"),
        ({"window_size": 64, "ngram_size": 16}, "at most 512 are supported"),
        (
            {"window_size": 5, "node_budget": 40},
            "node_budget=40 has no room for the window: .* raise node_budget to that",
        ),
        ({"pool_scope": "all"}, "pool_scope='all' is not .* must be request or salt"),
        ({"windows_size": 5}, "windows_size=5 is not an option .* use window_size, "),
        ({"prompt_lookup_max": 5}, "prompt_lookup_max=5 is not an option"),
        ({"num_speculative_tokens": 4}, "num_speculative_tokens=4 .* set ngram_size"),
    ],
)
def test_bad_options_are_named_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        LookaheadConfig.from_options(options)
    assert "\n" not in str(error.value)


def test_config_is_a_value() -> None:
    config = LookaheadConfig(window_size=3, ngram_size=4, verification_set_size=3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, ngram_size=6).num_speculative_tokens == 5
    assert repr(config) == (
        "LookaheadConfig(window_size=3, ngram_size=4, verification_set_size=3, "
        "node_budget=512, pool_scope=request)"
    )


def test_a_cpu_schedules_ahead_unless_told_otherwise(tmp_path: Path) -> None:
    model = write_config(tmp_path)
    for wanted, result in ((None, True), (True, True), (False, False)):
        config = engine_config(model, async_scheduling=wanted)
        assert config.scheduler_config.async_scheduling is result
    plain = engine_config(model, speculative_config=None)
    assert plain.scheduler_config.async_scheduling is False


def test_vllm_takes_the_config_through(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), async_scheduling=True)
    assert type(config.speculative_config) is LookaheadConfig
    assert config.parallel_config.worker_cls == support.V1_WORKER
    assert config.scheduler_config.scheduler_cls == support.SCHEDULER
    sent = pickle.loads(pickle.dumps(config))
    assert sent.speculative_config == config.speculative_config
    assert sent.compute_hash() == config.compute_hash()
    # Compiled graphs are cached by it, and other methods' have other attention layers.
    ngram = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3}
    other = engine_config(write_config(tmp_path), speculative_config=ngram)
    assert other.speculative_config.compute_hash() not in (
        config.speculative_config.compute_hash(),
        sent.speculative_config.compute_hash(),
    )


def test_engine_args_can_be_used_twice(tmp_path: Path) -> None:
    arguments = EngineArgs(
        write_config(tmp_path),
        skip_tokenizer_init=True,
        spec_method="lookahead",
        speculative_config={"window-size": 2},
    )
    for _ in range(2):
        config = arguments.create_engine_config().speculative_config
        assert isinstance(config, LookaheadConfig)
        assert config.window_size == 2


MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 64,
}
CHAINS = {
    "latent attention (MLA)": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 16,
    },
    "rotary positions of several dimensions (M-RoPE)": {
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}
    },
    "ALiBi": {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
    "chunked local attention": {"attention_chunk_size": 64},
    "sliding-window attention": MISTRAL,
    "sliding-window attention in every other layer": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
    },
}


@pytest.mark.parametrize("kind", CHAINS)
def test_one_chain_where_trees_cannot_branch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = SimpleNamespace(info=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(engine_config_module, "logger", log)
    model = write_config(tmp_path, **CHAINS[kind])
    name = kind.removesuffix(" in every other layer")
    config = engine_config(model).speculative_config
    default = default_params("cpu")
    assert config.params == LookaheadParams(
        0, default.ngram_size, 1, default.node_budget
    )
    assert said == [f"One chain per step: this model has {name}."]
    for size, value in (("window_size", 5), ("verification_set_size", 2)):
        options = {"method": "lookahead", size: value}
        words = re.escape(f"{size}={value} needs draft trees that branch, and this ")
        with pytest.raises(
            ValueError, match=f"{words}.* {re.escape(name)}: set {size}"
        ):
            engine_config(model, speculative_config=options)
    by_hand = {"window_size": 0, "verification_set_size": 1, "ngram_size": 5}
    options = {"method": "lookahead", **by_hand}
    config = engine_config(model, speculative_config=options).speculative_config
    assert config.params == LookaheadParams(**by_hand)


KINDS = {
    "R-SWA": {"rswa_window": 64},
    "encoder-decoder models": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_target_positions": 64,
    },
    "models without attention": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
    },
    "recurrent state on a CPU": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_unsupported_models_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = write_config(tmp_path, **KINDS[kind])
    with pytest.raises(ValueError, match=f"lookahead does not support {kind} "):
        engine_config(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"runner": "pooling"}, "does not support pooling models"),
        ({"pipeline_parallel_size": 2}, "does not support pipeline parallelism"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls=mine.Worker cannot run"),
        ({"scheduler_cls": "mine.S"}, "--scheduler-cls=mine.S cannot run"),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            },
            "kv_connector=ExampleConnector cannot be combined",
        ),
        ({"spec_tokens": 4}, "num_speculative_tokens=4 is not an option"),
        ({"spec_model": "m"}, "model='m' is not an option"),
        ({"spec_method": "ngram"}, "--spec-method=ngram and .* mutually exclusive"),
    ],
)
def test_unsupported_setups_are_refused(
    arguments: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        engine_config(write_config(tmp_path), **arguments)


MOE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "sliding_window": None,
}


@pytest.mark.parametrize(("changes", "refused"), [(MOE, True), ({}, False)])
def test_data_parallelism_of_experts(
    changes: dict, refused: bool, tmp_path: Path
) -> None:
    """Ranks of a dense model are engines of their own."""
    model = write_config(tmp_path, **changes)
    config = engine_config(model, speculative_config=None)
    for size in (1, 2):
        config.parallel_config.data_parallel_size = size
        parts = config.model_config, config.parallel_config
        if refused and size > 1:
            with pytest.raises(ValueError, match="support data parallelism of mixture"):
                support.check_supported(*parts)
        else:
            support.check_supported(*parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
    ],
)
def test_an_unused_window_is_no_obstacle(changes: dict, tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path, **changes))
    assert isinstance(config.speculative_config, LookaheadConfig)


@pytest.mark.parametrize(
    ("platform", "triton", "wanted", "worker", "line"),
    [
        ("cpu", False, None, support.V1_WORKER, "V1 model runner: Triton is not"),
        ("cpu", False, True, support.V2_WORKER, "V2 model runner: VLLM_USE_V2"),
        ("cpu", True, None, support.V2_WORKER, "V2 model runner: Triton is there"),
        ("cpu", True, False, support.V1_WORKER, "V2_MODEL_RUNNER=0 says so"),
        ("cuda", True, None, support.V2_WORKER, "V2 model runner: Triton is there"),
        ("cuda", True, False, None, ""),
        ("xpu", True, None, None, ""),
    ],
)
def test_the_worker_follows_platform_and_runner(
    platform: str,
    triton: bool,
    wanted: bool | None,
    worker: str | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Platform:
        device_name = platform
        is_cpu = staticmethod(lambda: platform == "cpu")
        is_cuda = staticmethod(lambda: platform == "cuda")

    monkeypatch.setattr(support, "current_platform", Platform)
    monkeypatch.setattr(support, "HAS_TRITON", triton)
    monkeypatch.setattr(support.envs, "VLLM_USE_V2_MODEL_RUNNER", wanted, raising=False)
    said: list[str] = []
    log = SimpleNamespace(info=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(support, "logger", log)
    if worker:
        assert support.worker_class() == worker
        assert len(said) == 1 and line in said[0]
    else:
        with pytest.raises(ValueError, match="lookahead (does not run|needs)"):
            support.worker_class()


@pytest.mark.parametrize(
    ("wanted", "worker", "line"),
    [
        (None, support.V2_WORKER, "vLLM's V2 model runner: Triton is there for"),
        ("0", support.V1_WORKER, "V1 model runner: VLLM_USE_V2_MODEL_RUNNER=0 says"),
        ("1", support.V2_WORKER, "V2 model runner: VLLM_USE_V2_MODEL_RUNNER=1 says"),
    ],
)
def test_a_cpu_with_triton(
    wanted: str | None, worker: str, line: str, tmp_path: Path
) -> None:
    """As vLLM's CPU images have it: V2, unless the variable says otherwise."""
    code = "from vllm import EngineArgs; print(EngineArgs("
    code += f"{str(write_config(tmp_path))!r}, skip_tokenizer_init=True, "
    code += "speculative_config={'method': 'lookahead'})"
    code += ".create_engine_config().parallel_config.worker_cls)"
    env = v2_environment(VLLM_LOGGING_LEVEL="INFO")
    del env["VLLM_USE_V2_MODEL_RUNNER"]
    if wanted is not None:
        env["VLLM_USE_V2_MODEL_RUNNER"] = wanted
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[-1] == worker
    assert line in done.stdout + done.stderr
