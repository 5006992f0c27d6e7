# SPDX-License-Identifier: Apache-2.0
"""The plugin where nobody asked for lookahead, and on a vLLM it does not know."""

import inspect
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_plugins_by_group
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lookahead import plugin
from vllm_lookahead.engine import patches
from vllm_lookahead.engine.patches import (
    add_cli_args,
    async_methods,
    create_speculative_config,
    from_cli_args,
    generate,
    refuse,
    sampler_warmups,
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


@pytest.fixture
def a_vllm_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test patches is not patched afterwards."""
    monkeypatch.setattr(patches, "_installed", set())
    monkeypatch.setattr(refuse, "reason", "")
    for name in ("create_speculative_config", "add_cli_args", "from_cli_args"):
        found = inspect.getattr_static(EngineArgs, name)
        monkeypatch.setattr(EngineArgs, name, found)


@pytest.mark.usefixtures("a_vllm_of_its_own")
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


@pytest.mark.usefixtures("a_vllm_of_its_own")
@pytest.mark.parametrize(
    ("argument", "asked"),
    [
        ("lookahead", True),
        ("--speculative=lookahead", True),
        ('{"method": "lookahead"}', True),
        ("models/lookahead-7b", False),
        ("--port=8000", False),
    ],
)
def test_a_plugin_that_cannot_install_itself_says_why(
    argument: str,
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To those who ask for lookahead: at once, and where vLLM takes their options."""
    monkeypatch.setattr(validate_spec_decode, "TARGET", "vllm.sampling_params:Gone.it")
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", argument])
    caplog.set_level(logging.WARNING, "vllm.lookahead")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    plugin.register()
    assert ("has no attribute 'Gone'" in caplog.text) == asked
    args = EngineArgs("model", speculative_config={"method": "lookahead"})
    with pytest.raises(
        ValueError, match=r"could not be installed.*no attribute 'Gone'"
    ):
        args.create_speculative_config(None, None)
    assert EngineArgs("model").create_speculative_config(None, None) is None
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--speculative", "lookahead"])
    with pytest.raises(ValueError, match="could not be installed"):
        EngineArgs.from_cli_args(given).create_speculative_config(None, None)


def test_a_clone_that_is_not_installed_says_how(tmp_path: Path) -> None:
    package = Path(plugin.__file__).parent
    shutil.copytree(package, tmp_path / "vllm_lookahead")
    command = [sys.executable, "-I", "-S", "-c"]
    command += [
        f"import sys; sys.path.append({str(tmp_path)!r}); import vllm_lookahead"
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: vllm-lookahead is not installed; in a clone of it, run "
        "pip install --no-deps --no-build-isolation -e ."
    )


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
    assert "async_methods" in names


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


@pytest.mark.parametrize(
    ("method", "on_cuda", "is_registered"),
    [
        ("lookahead", True, False),
        ("lookahead", False, True),
        ("ngram", True, True),
        (None, True, True),
    ],
)
def test_only_lookahead_goes_without_the_samplers_warm_up(
    method: str | None,
    on_cuda: bool,
    is_registered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speculative = SimpleNamespace(method=method) if method else None
    config = SimpleNamespace(speculative_config=speculative)
    name = "get_current_vllm_config_or_none"
    monkeypatch.setattr(sampler_warmups, name, lambda: config)
    platform = SimpleNamespace(is_cuda=lambda: on_cuda)
    monkeypatch.setattr(sampler_warmups, "current_platform", platform)
    calls: list[str] = []
    sampler_warmups.wrap(lambda: calls.append("registered"))()
    assert bool(calls) == is_registered


def test_the_allow_list_grows_by_one() -> None:
    from typing import Literal, get_args

    grown = async_methods.wrap(Literal["ngram_gpu"])
    assert get_args(grown) == ("ngram_gpu", "lookahead")
