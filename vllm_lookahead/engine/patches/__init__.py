# SPDX-License-Identifier: Apache-2.0
"""Upstream symbols that neither a registry nor a subclass reaches, one per file.

Each file names its `TARGET` and has `wrap(original)`, which returns what goes in the
original's place: the same thing, unless lookahead was asked for.
"""

from collections.abc import Iterable
from functools import reduce
from importlib import import_module
from typing import Any

SUPPORTED = ((0, 32), (0, 34))  # vllm>=0.32,<0.34
OPTIONS = ("add_cli_args", "from_cli_args")

_installed: set[str] = set()


def names(version: tuple[Any, ...]) -> list[str]:
    """The patches for a version of vLLM, as names of files in this folder."""
    if not SUPPORTED[0] <= version[:2] < SUPPORTED[1]:
        return [*OPTIONS, "refuse"]
    configs = ["create_engine_config", "create_speculative_config"]
    return [*OPTIONS, *configs, "validate_spec_decode", "async_methods"]


def upstream(target: str) -> tuple[Any, str]:
    """The object that holds "module:Class.attribute", and the attribute's name."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    return reduce(getattr, owners, import_module(module)), name


def install(patch_names: Iterable[str]) -> None:
    """Put patches in place, once, and all of them or none.

    Raises:
        ImportError, AttributeError, KeyError: an upstream symbol is gone.
    """
    replacements = []
    for patch_name in set(patch_names) - _installed:
        patch = import_module(f"{__name__}.{patch_name}")
        owner, name = upstream(patch.TARGET)
        replacements.append((owner, name, patch.wrap(vars(owner)[name])))
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    _installed.update(patch_names)
