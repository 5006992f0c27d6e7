# SPDX-License-Identifier: Apache-2.0
"""Which models and set-ups lookahead can run, and with which engine."""

from collections.abc import Mapping
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

logger = init_logger("vllm.lookahead")

V1_EXECUTOR = "vllm_lookahead.engine.v1.executor.LookaheadExecutor"
V1_WORKER = "vllm_lookahead.engine.v1.worker.LookaheadCPUWorker"
V2_WORKER = "vllm_lookahead.engine.v2.worker.LookaheadWorker"
SCHEDULER = "vllm_lookahead.engine.scheduler.LookaheadScheduler"


def worker_class() -> str:
    """The worker for this platform and for the model runner that vLLM picks on it.

    Says in the log which one that is, and why.

    Raises:
        ValueError: a platform or a model runner that lookahead does not run on.
    """
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(
            f"lookahead does not run on {current_platform.device_name}: "
            "use CUDA or CPU, or start without lookahead"
        )
    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    if wanted is None:
        is_v2 = HAS_TRITON
        reason = f"Triton is {'' if HAS_TRITON else 'not '}there for this device"
    else:
        is_v2, reason = wanted, f"VLLM_USE_V2_MODEL_RUNNER={wanted:d} says so"
    if not is_v2 and not current_platform.is_cpu():
        raise ValueError(
            "lookahead needs vLLM's V2 model runner on CUDA: unset "
            "VLLM_USE_V2_MODEL_RUNNER and install Triton"
        )
    logger.info(
        "Lookahead runs in vLLM's %s model runner: %s.", "V2" if is_v2 else "V1", reason
    )
    return V2_WORKER if is_v2 else V1_WORKER


def refuse(found: Mapping[str, bool]) -> None:
    """Raise for the first of the features found on, by name."""
    for name, is_on in found.items():
        if is_on:
            raise ValueError(
                f"lookahead does not run with {name}: switch it off, or start "
                "without lookahead"
            )


def why_one_chain(model: Any) -> str:
    """What a model has that draft trees cannot branch on; "" where they can.

    One chain a step needs nothing of ours: vLLM's own attention reads several tokens of
    a request in causal order, and keeps the state of the accepted ones.

    Args:
        model: vLLM's `ModelConfig`.
    """
    text = model.hf_text_config
    layers = set(getattr(text, "layer_types", None) or ())
    windowed = {name for name in layers if "sliding" in name or "chunked" in name}
    # A window in the config holds for layers whose type says nothing else.
    everywhere = not layers - windowed and not model.disable_sliding_window
    kinds = {
        "latent attention (MLA)": model.use_mla,
        "recurrent state": model.is_hybrid or model.has_inner_state,
        "rotary positions of several dimensions (M-RoPE)": model.uses_mrope,
        "ALiBi": model.uses_alibi,
        "chunked local attention": model.attention_chunk_size is not None,
        "sliding-window attention": bool(windowed)
        or (everywhere and model.get_sliding_window() is not None),
    }
    return next((kind for kind, found in kinds.items() if found), "")


def check_supported(model: Any, parallel: Any) -> None:
    """Refuse what lookahead cannot run on, by name.

    Args:
        model: vLLM's `ModelConfig`.
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ValueError: naming the first kind of model or parallelism that is in the way.
    """
    kinds = {
        "pooling models": model.runner_type == "pooling",
        "encoder-decoder models": model.is_encoder_decoder,
        "diffusion models": model.is_diffusion,
        "models without attention": model.is_attention_free,
        "R-SWA": model.rswa_window is not None,
        # Its kernels of recurrent layers keep no state per draft to go back to.
        "recurrent state on a CPU": current_platform.is_cpu()
        and (model.is_hybrid or model.has_inner_state),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        # Its ranks agree on a graph: one with trees would choose for one without.
        "data parallelism of mixture-of-experts models": model.is_moe
        and parallel.data_parallel_size > 1,
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(
                f"lookahead does not support {kind} (model {model.model}): "
                "start without lookahead"
            )
