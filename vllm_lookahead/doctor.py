# SPDX-License-Identifier: Apache-2.0
"""What lookahead would do with a model, without loading its weights.

    python -m vllm_lookahead.doctor MODEL

says which vLLM is installed and which of its engines runs, and if the model is drafted
in trees, in one chain per step, or not at all, and why. It goes by the model's config:
a layer that the config does not tell of may still make chains of trees when the model
is loaded, and says so then.
"""

import argparse
import sys
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs

from vllm_lookahead.engine.patches import SUPPORTED
from vllm_lookahead.engine.support import (
    V2_WORKER,
    check_supported,
    why_one_chain,
    worker_class,
)


def engine() -> str:
    """Which of vLLM's model runners lookahead has here.

    Raises:
        ValueError: none of them.
    """
    return "V2" if worker_class() == V2_WORKER else "V1"


def drafts(config: Any) -> str:
    """What a step of a model is fed.

    Args:
        config: vLLM's, of the model without lookahead.

    Raises:
        ValueError: nothing, and why.
    """
    check_supported(config.model_config, config.parallel_config)
    why = why_one_chain(config.model_config)
    return f"one chain per step: this model has {why}" if why else "trees"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a folder or a name, as for `vllm serve`")
    model = parser.parse_args(arguments).model
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    print(f"vLLM {vllm.__version__}")
    try:
        if not SUPPORTED[0] <= version < SUPPORTED[1]:
            raise ValueError(f"lookahead was not tested with vLLM {vllm.__version__}")
        print(f"engine: {engine()}")
        config = EngineArgs(model, skip_tokenizer_init=True).create_engine_config()
        print(f"drafts: {drafts(config)}")
    except ValueError as error:
        print(f"refused: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
