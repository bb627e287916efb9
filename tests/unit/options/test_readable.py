"""What Megatron's parser and its assertions say, in words: flags as they are typed, a few lines, and what is legal."""

import argparse
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.options.readable import patch_parser, readable


def parser() -> argparse.ArgumentParser:
    """Some flags as Megatron declares them."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--fp16", action="store_true")
    made.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    made.add_argument("--hidden-size", type=int)
    made.add_argument("--num-attention-heads", type=int)
    made.add_argument("--lr", type=float, help="0.1% is usual")
    made.add_argument("--lr-decay-style", default="linear", choices=["constant", "linear", "cosine"])
    for number in range(700):
        made.add_argument(f"--other-{number}", help="as many as Megatron has")
    patch_parser(made)
    return made


# Some of what `megatron.training.arguments.validate_args` does, in its own manner; pytest would rewrite our assertions.
VALIDATION = """
def validate(args):
    if args.fp16:
        assert not args.bf16
    if args.hidden_size is not None:
        assert args.num_attention_heads is not None
        assert args.hidden_size % args.num_attention_heads == 0
        assert args.hidden_size >= 8, "models are wider"
    if not args.add_bias_linear:
        assert args.lr_decay_style in ("constant", "linear")
    if args.lr == 7:
        raise ValueError("seven is no learning rate")
"""


@pytest.fixture
def validate(tmp_path: Path) -> Callable[[argparse.Namespace], None]:
    (tmp_path / "arguments.py").write_text(VALIDATION)
    return runpy.run_path(str(tmp_path / "arguments.py"))["validate"]


@pytest.mark.parametrize(
    ("words", "said", "got"),
    [
        ("--bf16 --fp16", "--bf16 must not be given, where --fp16 is given", "--bf16, --fp16"),
        ("--hidden-size 8", "--num-attention-heads is needed, where --hidden-size is given", "no --num-attention"),
        (
            "--hidden-size 9 --num-attention-heads 2",
            "--hidden-size must be a multiple of --num-attention-heads",
            "--hidden-size 9, --num-attention-heads 2",
        ),
        ("--hidden-size 4 --num-attention-heads 2", "models are wider", "--hidden-size 4"),
        ("--disable-bias-linear --lr-decay-style cosine", "--lr-decay-style must be one of", "cosine"),
        ("--lr 7", "seven is no learning rate", "--lr 7.0"),
    ],
)  # fmt: skip
def test_an_assertion_becomes_a_sentence(validate, words: str, said: str, got: str) -> None:
    flags = parser()
    args = flags.parse_args(words.split())
    with pytest.raises(ConfigError, match="Megatron refuses this combination of flags") as error, readable(args, flags):
        validate(args)
    assert said in str(error.value)
    assert re.search(rf"\n  got:   .*{got}", str(error.value))
    assert "args." not in str(error.value)


def test_what_is_right_passes(validate) -> None:
    flags = parser()
    args = flags.parse_args(["--bf16", "--hidden-size", "8", "--num-attention-heads", "2", "--disable-bias-linear"])
    with readable(args, flags):
        validate(args)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr-decay-style cosin", "--lr-decay-style: no such value\n  got:   cosin\n  legal: did you mean 'cosine'?"),
        ("--hidden-size much", "--hidden-size: no such value\n  got:   much\n  legal: a whole number"),
        ("--lr=", "--lr: no such value\n  got:   \n  legal: a finite number of at least 0"),
        ("--hiden-size 8", "--hiden-size: did you mean '--hidden-size'?"),
        ("--qqqqqq", "--qqqqqq: no flag is like it, see --help"),
        ("--qqqqqq " + "x" * 5000, "--qqqqqq: no flag is like it, see --help"),
        ("--hidden-size", "argument --hidden-size: expected one argument\n  legal: see --help"),
    ],
)
def test_a_wrong_word_is_told_in_a_few_lines(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parser().parse_args(words.split())
    assert said in str(error.value)
    assert len(str(error.value)) < 500


def test_a_percent_sign_of_megatrons_does_not_break_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "0.1% is usual" in capsys.readouterr().out
