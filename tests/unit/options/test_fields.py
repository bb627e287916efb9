import argparse
from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_ext.options.fields import add_options, option, read_options


@dataclass(frozen=True)
class Options:
    """How to cut.

    More about it.
    """

    teacher: str | None = option(None, "Checkpoint of the teacher.")
    keep_ratio: float = option(0.5, "Keep 50% of it.")
    steps: int = option(3, "Steps.")
    metric: Literal["l2", "mean"] = option("l2", "The metric.")
    targets: list[int] | None = option(None, "Targets.")
    exact: bool = option(False, "Be exact.")
    tied: bool = option(True, "Tie.")


def parse(*words: str, prefix: str = "prune") -> Options:
    parser = add_options(argparse.ArgumentParser(exit_on_error=False), Options, prefix)
    return read_options(parser.parse_args(words), Options, prefix)


def test_nothing_given_is_the_dataclass_itself():
    assert parse() == Options()


def test_every_kind_of_field_comes_back_in_its_type():
    words = "--prune-teacher run/a --prune-keep-ratio 0.25 --prune-steps 7 --prune-metric mean --prune-targets 4 8"
    assert parse(*words.split(), "--prune-exact", "--no-prune-tied") == Options(
        teacher="run/a", keep_ratio=0.25, steps=7, metric="mean", targets=[4, 8], exact=True, tied=False
    )


@pytest.mark.parametrize("words", [["--prune-metric", "l1"], ["--prune-steps", "many"], ["--prune-targets", "x"]])
def test_a_value_of_another_type_is_refused(words):
    with pytest.raises(argparse.ArgumentError, match=words[0]):
        parse(*words)


def test_flags_carry_the_jobs_prefix_so_that_two_jobs_can_share_a_parser():
    parser = argparse.ArgumentParser()
    add_options(parser, Options, "prune")
    add_options(parser, Options, "distill")
    namespace = parser.parse_args(["--prune-steps", "1", "--distill-steps", "2"])
    assert read_options(namespace, Options, "prune").steps == 1
    assert read_options(namespace, Options, "distill").steps == 2
    assert not hasattr(namespace, "steps")


def test_help_shows_the_group_the_text_and_the_default(capsys):
    parser = add_options(argparse.ArgumentParser(), Options, "prune")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "megatron_ext prune: How to cut." in out
    assert "More about it" not in out
    assert "Keep 50% of it. Default: 0.5." in out
    assert "Checkpoint of the teacher. Default" not in out
