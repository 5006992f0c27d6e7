# SPDX-License-Identifier: Apache-2.0
"""What a user's `EngineArgs` say about speculation. Imports nothing from vLLM."""

from typing import Any

from vllm_lookahead.params import METHOD

# Fields of `EngineArgs` that stand for keys of its `speculative_config`.
ALIASES = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}


def asked_for(engine_args: Any) -> bool:
    """Whether the method is lookahead, by either way of saying so."""
    config = engine_args.speculative_config or {}
    return METHOD in (engine_args.spec_method, config.get("method"))


def speculative_options(engine_args: Any) -> dict[str, Any]:
    """The options by their names in `speculative_config`, from everywhere.

    Raises:
        ValueError: two values for one option.
    """
    config = engine_args.speculative_config or {}
    options = {name.replace("-", "_"): value for name, value in config.items()}
    for field, name in ALIASES.items():
        value = getattr(engine_args, field)
        if value is not None and options.setdefault(name, value) != value:
            flag = f"--{field}".replace("_", "-")
            raise ValueError(
                f"{flag}={value} and --speculative-config['{name}']={options[name]} "
                "are mutually exclusive: drop one of them"
            )
    return options
