# SPDX-License-Identifier: Apache-2.0
"""The plugin where nobody asked for lookahead, and on a vLLM it does not know."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_plugins_by_group

from vllm_lookahead import plugin
from vllm_lookahead.engine import patches
from vllm_lookahead.engine.patches import (
    add_cli_args,
    async_methods,
    create_speculative_config,
    from_cli_args,
    generate,
    refuse,
    validate_spec_decode,
)


def test_vllm_finds_the_plugin() -> None:
    found = load_plugins_by_group("vllm.general_plugins")
    assert found["lookahead"] is plugin.register


def test_register_is_reentrant() -> None:
    plugin.register()
    once = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is once


def test_register_imports_no_torch() -> None:
    code = (
        "import sys; from vllm_lookahead.plugin import register; register();"
        "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("error", [ImportError("gone"), AttributeError, KeyError("x")])
def test_register_never_raises(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(names: Any) -> None:
        raise error

    monkeypatch.setattr(patches, "install", fail)
    plugin.register()
    monkeypatch.delattr(vllm, "__version_tuple__")
    plugin.register()


def test_all_patches_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_installed", set())
    monkeypatch.setattr(refuse, "TARGET", "vllm.engine.arg_utils:EngineArgs.gone")
    before = dict(vars(EngineArgs))
    with pytest.raises(KeyError, match="gone"):
        patches.install(["from_cli_args", "refuse"])
    assert dict(vars(EngineArgs)) == before


@pytest.mark.parametrize("version", [(0, 32, 0), (0, 32, 1, "dev3"), (0, 33, 2)])
def test_tested_versions_run_lookahead(version: tuple) -> None:
    names = patches.names(version)
    assert "create_speculative_config" in names
    assert "refuse" not in names
    assert ("async_methods" in names) == (version[:2] == (0, 32))


@pytest.mark.parametrize("version", [(0, 31, 9), (0, 34, 0), (1, 0), (0, 0, "dev")])
def test_other_versions_refuse_lookahead_alone(version: tuple) -> None:
    assert patches.names(version) == ["add_cli_args", "from_cli_args", "refuse"]

    create = refuse.wrap(lambda self, model, parallel: (model, parallel))
    plain = SimpleNamespace(speculative_config=None, spec_method="ngram")
    assert create(plain, "model", parallel="parallel") == ("model", "parallel")
    asked = SimpleNamespace(speculative_config={"method": "lookahead"}, spec_method="")
    with pytest.raises(ValueError, match=r"install vllm>=0.32,<0.34, or start without"):
        create(asked, "model", "parallel")


PLAIN = [None, {"method": "ngram", "num_speculative_tokens": 3}]


@pytest.mark.parametrize("options", PLAIN)
def test_plain_configs_are_vllms(options: dict | None) -> None:
    plain = SimpleNamespace(speculative_config=options, spec_method=None)
    create = create_speculative_config.wrap(lambda *arguments: arguments)
    assert create(plain, "model", "parallel") == (plain, "model", "parallel")


@pytest.mark.parametrize("options", PLAIN)
def test_plain_arguments_are_vllms(options: dict | None) -> None:
    plain = SimpleNamespace(speculative_config=options, spec_method=None)

    class Upstream:
        @classmethod
        def from_cli_args(cls, args: Any) -> Any:
            return plain

    wrapped = from_cli_args.wrap(vars(Upstream)["from_cli_args"])
    assert wrapped.__func__(Upstream, SimpleNamespace()) is plain
    assert plain.speculative_config is options


def test_a_parser_that_took_the_names_is_left_alone() -> None:
    class Upstream:
        @staticmethod
        def add_cli_args(parser: Any) -> Any:
            return parser

    parser = SimpleNamespace(_actions=[])
    wrapped = add_cli_args.wrap(vars(Upstream)["add_cli_args"])
    assert wrapped.__func__(parser) is parser


@pytest.mark.parametrize("config", [None, SimpleNamespace(method="ngram")])
def test_plain_requests_are_vllms(config: Any) -> None:
    bad = SimpleNamespace(extra_args={"lookahead_what": 1})
    validate = validate_spec_decode.wrap(lambda *arguments: arguments)
    assert validate(bad, config) == (bad, config)

    engine = SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=config))
    answer = generate.wrap(lambda *arguments, **named: (arguments, named))
    assert answer(engine, "prompt", bad, "id", priority=1) == (
        (engine, "prompt", bad, "id"),
        {"priority": 1},
    )


def test_the_allow_list_grows_by_one() -> None:
    from typing import Literal, get_args

    grown = async_methods.wrap(Literal["ngram_gpu"])
    assert get_args(grown) == ("ngram_gpu", "lookahead")
