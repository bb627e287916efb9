import argparse

import pytest

from megatron_ext import cli
from megatron_ext.options import help


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


def test_the_short_form_has_our_flags_and_those_that_are_used_most(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, "prune", "--help")
    assert said.startswith("usage: megatron-ext prune FLAG ...\n")
    for flag in ("--prune-target-params X", "--load DIR", "--tensor-model-parallel-size N", "--help all"):
        assert flag in said
    assert "--use-tp-pp-dp-mapping" not in said, "one of the other thousand"
    assert len(said) < 16_000


def test_of_image_networks_it_has_no_flag_of_texts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = shown(capsys, "vision", "--help")
    assert "--images-train TEXT" in said
    assert "--tensor-model-parallel-size N" in said
    assert "--tokenizer-model" not in said
    assert "\n  evaluate                        measure an image classifier on labelled images\n" in said


def test_a_word_finds_the_flags_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, "distill", "--help", "Pipeline")
    assert "flags about 'Pipeline'\n" in said
    assert "--pipeline-model-parallel-size" in said
    assert "--lr-decay-style" not in said
    assert "--distill-teacher-pipeline" in shown(capsys, "distill", "--help", "teacher"), "ours, too"
    assert shown(capsys, "pretrain", "--help", "zebra") == "no flag is about 'zebra'\n"
    assert "--use-tp-pp-dp-mapping" in shown(capsys, "pretrain", "--help", "all")


def test_each_flag_that_is_used_most_exists(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    cli._add_megatrons(parser)
    known = {name for action in parser._actions for name in action.option_strings} | {"--preset"}
    for flags in help.MOST_USED.values():
        assert {flag.split()[0] for flag in flags} <= known
    assert {flag.split()[0] for flags in help.MOST_USED.values() for flag in flags} > help.OF_TEXT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--lr", "1"], None),
        (["-h"], ""),
        (["--help"], ""),
        (["--help", "--bf16"], ""),
        (["--help=pipeline"], "pipeline"),
        (["--lr", "1", "--help", "all"], "all"),
    ],
)
def test_what_is_asked_for(words: list[str], expected: str | None) -> None:
    assert help.asked(words) == expected


def test_under_torchrun_one_rank_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(capsys, "prune", "--help") == ""
    assert shown(capsys, "generate", "--help") == ""
