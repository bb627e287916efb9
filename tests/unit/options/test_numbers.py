"""Numbers that a flag cannot have are refused where they are read; every default is one that it can have."""

import argparse

import pytest

from megatron_ext.cli import COMMANDS
from megatron_ext.distillation.options import DistillOptions
from megatron_ext.errors import ConfigError
from megatron_ext.models.bootstrap import prepare
from megatron_ext.models.megatron_args import arguments
from megatron_ext.options.early_flags import early_parser
from megatron_ext.options.fields import add_options
from megatron_ext.options.numbers import BELOW, MAY_BE_ZERO, POSITIVE, SIGNED, Number
from megatron_ext.options.readable import patch_parser
from megatron_ext.pruning.options import PruneOptions

prepare()  # before Megatron is imported


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Megatron's flags and ours."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    add_options(parser, PruneOptions, "prune")
    add_options(parser, DistillOptions, "distill")
    patch_parser(parser)
    return parser


def refused(parser: argparse.ArgumentParser, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(list(words))
    return str(caught.value)


def test_every_default_is_legal(parser: argparse.ArgumentParser) -> None:
    early = early_parser({}, arguments())
    numbers = [action for action in (*parser._actions, *early._actions) if isinstance(action.type, Number)]
    assert len(numbers) > 200
    for action in numbers:
        for value in action.default if isinstance(action.default, list) else [action.default]:
            if value is not None:
                assert action.type(str(value)) == value, action.option_strings


def test_every_name_of_the_tables_is_a_flag(parser: argparse.ArgumentParser) -> None:
    from fnmatch import filter as among

    ours = argparse.ArgumentParser(conflict_handler="resolve")
    for name in ("data", "estimate", "convert", "evaluate", "generate"):
        COMMANDS[name].add_arguments(ours)
    names = [name.removeprefix("--") for p in (parser, ours) for a in p._actions for name in a.option_strings]
    for pattern in (*POSITIVE.split(), *MAY_BE_ZERO.split(), *SIGNED.split(), *BELOW):
        assert among(names, pattern), pattern


@pytest.mark.parametrize(
    ("words", "legal"),
    [
        (["--seq-length", "0"], "a whole number of at least 1"),
        (["--seq-length", "-1"], "a whole number of at least 1"),
        (["--seq-length", "6.5"], "a whole number of at least 1"),
        (["--eval-interval", "0"], "a whole number of at least 1"),
        (["--tensor-model-parallel-size", "0"], "a whole number of at least 1"),
        (["--train-iters", "-3"], "a whole number of at least 0"),
        (["--lr", "inf"], "a finite number of at least 0"),
        (["--lr", "nan"], "a finite number of at least 0"),
        (["--lr=-1"], "a finite number of at least 0"),
        (["--lr", "it's"], "a finite number of at least 0"),
        (["--adam-beta2", "1"], "a finite number of at least 0 and below 1"),
        (["--prune-samples", "4000000000"], "a whole number of at least 0 and below 10,000,000"),
        (["--norm-epsilon", "0"], "a finite number above 0"),
        (["--distill-temperature", "nan"], "a finite number of at least 0"),
    ],
    ids=" ".join,
)
def test_what_is_refused(parser: argparse.ArgumentParser, words: list[str], legal: str) -> None:
    flag, _, value = "=".join(words).partition("=")
    assert refused(parser, *words) == f"{flag}: no such value\n  got:   {value}\n  legal: {legal}"


def test_what_is_not(parser: argparse.ArgumentParser) -> None:
    given = "--lr 0 --lr-warmup-iters 0 --eval-iters 0 --manual-gc-interval 0 --rl-default-top-k -1 --seed 0"
    args = parser.parse_args([*given.split(), "--glu-linear-offset", "-1"])
    assert (args.lr, args.eval_iters, args.rl_default_top_k, args.glu_linear_offset) == (0.0, 0, -1, -1.0)
