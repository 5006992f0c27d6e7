# SPDX-License-Identifier: Apache-2.0
import argparse
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.test_patches import original
from vllm_lookahead.engine.options import asked_for, speculative_options

native_options = original(EngineArgs, "add_cli_args")


def parse(*argv: str, args_class: Any = AsyncEngineArgs) -> Any:
    parser = args_class.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    return args_class.from_cli_args(parser.parse_args(list(argv)))


@pytest.mark.parametrize("args_class", [AsyncEngineArgs, EngineArgs])
@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--speculative", "lookahead"], {}),
        (["--speculative=lookahead"], {}),
        (["--spec-method", "lookahead"], {}),
        (["-sc", '{"method":"lookahead"}'], {}),
        (["--speculative", '{"method":"lookahead"}'], {}),
        (["--speculative.method", "lookahead"], {}),
        (
            ["--speculative", "lookahead", "--speculative.window_size", "5"],
            {"window_size": 5},
        ),
        (
            ["--speculative-config.window-size=5", "--speculative", "lookahead"],
            {"window_size": 5},
        ),
        (
            ["--lookahead-window-size", "5", "-sc", '{"method":"lookahead"}'],
            {"window_size": 5},
        ),
        (
            ["--speculative=lookahead", "--lookahead_ngram_size=4"]
            + ["--lookahead-verification-set-size=7"],
            {"ngram_size": 4, "verification_set_size": 7},
        ),
        (
            ["--speculative=lookahead", "--lookahead-pool-scope=salt"],
            {"pool_scope": "salt"},
        ),
    ],
)
def test_ways_to_ask(argv: list[str], options: dict, args_class: Any) -> None:
    engine_args = parse(*argv, args_class=args_class)
    assert asked_for(engine_args)
    assert speculative_options(engine_args) == {"method": "lookahead"} | options


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--lookahead-window-size=65", "--speculative=lookahead"],
            "argument --lookahead-window-size: window_size=65 .* from 0 to 64",
        ),
        (["--lookahead-ngram-size=many"], "ngram_size='many' is not allowed"),
        (["--lookahead-ngram-size=-1"], "ngram_size='-1' is not allowed"),
        (["--speculative", "lokahead"], "'lokahead' is neither 'lookahead' nor JSON"),
    ],
)
def test_the_parser_refuses(argv: list[str], words: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=words):
        parse(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lookahead-window-size=5"], "size=5 needs --speculative lookahead"),
        (
            ["--lookahead-ngram-size=5", "--spec-method=ngram"],
            "--lookahead-ngram-size=5 needs --speculative lookahead",
        ),
        (
            ["--lookahead-window-size=5", "-sc", '{"method":"lookahead"}']
            + ["-sc", '{"method":"lookahead", "window-size":4}'],
            r"--lookahead-window-size and --speculative-config\['window_size'\] are",
        ),
    ],
)
def test_sizes_need_lookahead(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--speculative", "None"],
        ["--speculative", '{"method":"ngram","num_speculative_tokens":3}'],
        ["--speculative.method", "ngram", "--speculative.num_speculative_tokens", "3"],
        ["--speculative.list+", "1,2", "--speculative.a.b=3"],
        ["-sc", '{"a":1}', "--speculative.b", "2"],
        ["--speculative", '{"a":1}', "--speculative-config", '{"b":2}'],
        ["--speculative_config", '{"a":1}', "--spec-method", "ngram"],
    ],
)
def test_native_meanings_are_kept(argv: list[str]) -> None:
    native = native_options(FlexibleArgumentParser()).parse_args(argv)
    engine_args = parse(*argv)
    assert engine_args.speculative_config == native.speculative_config
    assert engine_args.spec_method == native.spec_method


def test_help_shows_the_options(capsys: pytest.CaptureFixture) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    FlexibleArgumentParser._search_keyword = "lookaheadconfig"
    try:
        text = parser.format_help()
    finally:
        FlexibleArgumentParser._search_keyword = None
    for flag in ("--speculative lookahead", "--lookahead-window-size 0..64"):
        assert flag in text
