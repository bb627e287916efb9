"""Flags that would do nothing are refused by name; the tables name flags that the installed Megatron has."""

import argparse

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.models.bootstrap import prepare
from megatron_ext.options.unsupported import CUDA, REFUSED, TRANSFORMER_ENGINE, check_flags, refusal

prepare()  # before Megatron is imported


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, megatron: dict[str, argparse.Action]) -> None:
    """A machine without GPUs and optional packages, wherever the test runs."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("megatron_ext.platform.device_type", lambda: "cpu")


@pytest.fixture(scope="module")
def megatron() -> dict[str, argparse.Action]:
    """Megatron's flags, without their hyphens."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name.removeprefix("--"): action for action in parser._actions for name in action.option_strings}


@pytest.mark.usefixtures("bare")
def test_every_entry_is_a_flag_of_the_installed_megatron(megatron: dict[str, argparse.Action]) -> None:
    from fnmatch import fnmatchcase

    for names in (*REFUSED.values(), TRANSFORMER_ENGINE, CUDA):
        for pattern in names.split():
            found = [name for name in megatron if fnmatchcase(name, pattern)]
            assert found, f"{pattern} is no flag of Megatron's"
            for name in found:
                assert refusal(["--lr", "1", f"--{name}"]) is not None, name
                assert refusal([f"--{name}=1"]) is not None, name


@pytest.mark.usefixtures("bare")
def test_a_refusal_says_why_and_what_instead() -> None:
    for words, said in (
        (["--reset-attention-mask"], "across the documents.*--eod-mask-loss"),
        (["--lr", "1", "--reset-position-ids"], "--reset-position-ids would have no effect"),
        (["--dataloader-inter-document-masking"], "whole rows"),
        (["--sft"], "no supervised fine-tuning"),
        (["--full-validation"], "--skip-train measures on the whole"),
        (["--optimizer", "muon"], "emerging_optimizers is not installed.*adam"),
        (["--optimizer=lion"], "emerging_optimizers"),
        (["--fp8-format", "hybrid"], "Transformer Engine, which is not installed"),
        (["--cuda-graph-impl=local"], "Transformer Engine"),
        (["--use-nccl-ub"], "CUDA devices"),
        (["--async-save", "--use-persistent-ckpt-worker"], "--async-save would have no effect: it needs CUDA devices"),
        (["--dataloader-type", "external"], "single or cyclic"),
        (["--num-workers", "2"], "CUDA device.*legal: 0"),
        (["--enable-msc"], "multi-storage-client is not installed"),
        (["--rerun-mode", "report_stats"], "validate_results"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){said}"):
            check_flags(words)


def test_what_works_passes() -> None:
    check_flags(["--optimizer", "adam", "--cuda-graph-impl", "none", "--dataloader-type=cyclic", "--eod-mask-loss"])
    check_flags(["--hybrid-layer-pattern=-M*", "--split", "99,1,0", "--lr", "1e-3", "--use-distributed-optimizer"])
    check_flags([])
