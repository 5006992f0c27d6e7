# SPDX-License-Identifier: Apache-2.0
"""Carry the `--lookahead-*` options into `EngineArgs.speculative_config`.

Why: `from_cli_args` keeps the fields of its dataclass and drops every other option.
Remove: when a plugin can add options of its own.
"""

from functools import wraps
from typing import Any

from vllm_lookahead.engine.options import asked_for, speculative_options
from vllm_lookahead.params import OPTIONS, REQUEST_PREFIX

TARGET = "vllm.engine.arg_utils:EngineArgs.from_cli_args"


def wrap(original: Any) -> Any:
    create = original.__func__

    @wraps(create)
    def from_cli_args(cls: Any, args: Any) -> Any:
        engine_args = create(cls, args)
        for name in OPTIONS:
            value = getattr(args, REQUEST_PREFIX + name, None)
            if value is None:
                continue
            flag = f"--{REQUEST_PREFIX}{name}".replace("_", "-")
            if not asked_for(engine_args):
                raise ValueError(f"{flag}={value} needs --speculative lookahead")
            if name in speculative_options(engine_args):
                raise ValueError(
                    f"{flag} and --speculative-config['{name}'] are mutually "
                    "exclusive: drop one of them"
                )
            config = engine_args.speculative_config or {}
            engine_args.speculative_config = {**config, name: value}
        return engine_args

    return classmethod(from_cli_args)
