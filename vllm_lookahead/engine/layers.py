# SPDX-License-Identifier: Apache-2.0
"""What the layers of a loaded model can be fed: trees, one chain, or no drafts."""

from collections.abc import Iterator

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_lookahead.engine.config import LookaheadConfig, refuse_branches

logger = init_logger("vllm.lookahead")

# Kinds of recurrent state that vLLM takes back to the last accepted token.
ROLLED_BACK = ("MAMBA2", "GDN_ATTN", "SHORT_CONV")


def check_layers(vllm_config: VllmConfig) -> None:
    """Refuse layers that cannot be fed drafts at all.

    Raises:
        ValueError: naming the first one and its type.
    """
    layers = get_layers_from_vllm_config(vllm_config, MambaBase)
    for name, layer in layers.items():
        if layer.mamba_type.name not in ROLLED_BACK:
            raise ValueError(
                f"lookahead does not support {type(layer).__name__} (layer {name}), "
                "whose state cannot be taken back to the last accepted token: start "
                "without lookahead"
            )


def no_trees(vllm_config: VllmConfig) -> Iterator[str]:
    """What each layer has that no attention of ours computes."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    for name, layer in layers.items():
        found = {
            "latent attention (MLA)": isinstance(layer, MLAAttention),
            "recurrent state": isinstance(layer, MambaBase),
            f"layers of the type {type(layer).__name__}": type(layer) is not Attention,
        }
        impl = getattr(layer, "impl", None)
        if type(layer) is Attention:
            found |= {
                "sliding-window attention": layer.sliding_window is not None,
                "attention sinks": getattr(impl, "sinks", None) is not None,
                "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
            }
        yield from (f"{what} (layer {name})" for what, is_so in found.items() if is_so)


def may_branch(config: LookaheadConfig, obstacles: Iterator[str]) -> bool:
    """Whether a loaded model's trees may branch; says so where they may not.

    Args:
        config: the server's.
        obstacles: what is in the way, of the layers.

    Raises:
        ValueError: they may not, and the sizes were given by hand.
    """
    if not config.params.can_branch:
        return False
    why = next(obstacles, "")
    if why and config.asks_for_branches:
        refuse_branches(config.params, why)
    if why:
        logger.info("One chain per step: this model has %s.", why)
    return not why
