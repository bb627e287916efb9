"""One command from a Hugging Face model to a smaller one: its stages, each as the program that it is."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import fork_server
import pytest
import torch
from hf_models import make
from workspace import Workspace

from megatron_ext import cli
from megatron_ext.compression import job, report
from megatron_ext.compression.recipe import Recipe
from megatron_ext.workflow import Stage

COMMAND = str(Path(sys.executable).parent / "megatron-ext")
TARGET = ("--to", "0.7", "--tokens", "2K", "--seq-length", "64", "--global-batch-size", "8", "--split", "90,10,0")
FLAGS = (*TARGET, "--processes", "1", "--prune-samples", "16", "--micro-batch-size", "8", "--lr", "2e-3")


def forget() -> None:
    """Let Megatron forget the command line that was validated in this process."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    unset_num_microbatches_calculator()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> Path:
    """A Qwen3 with the workspace's tokenizer."""
    path = workspace.path / "compress-hf"
    make("qwen3", path, vocab_size=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((workspace.path / "data" / "tokenizer" / name).read_text())
    return path


@pytest.fixture(scope="module")
def made(workspace: Workspace, model: Path) -> list[Stage]:
    """The stages of a compression, all of them done."""
    out, data = workspace.path / "compressed", workspace.path / "data" / "text_document"
    words = [str(model), "--out", str(out), "--data-path", str(data), *FLAGS]
    recipe = parsed(*words)
    out.mkdir()
    recipe.write(out / "recipe.yaml")
    stages = recipe.at(model, out)
    for stage in stages:
        assert not stage.done
        done = fork_server.run([COMMAND, *stage.words], cwd=workspace.path)
        assert done.returncode == 0, f"{stage.title}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert stage.done
    return stages


def parsed(*words: str) -> Recipe:
    """The recipe of a command line."""
    parser = argparse.ArgumentParser()
    cli.COMMANDS["compress"].add_arguments(parser)
    args, args.megatron_flags = parser.parse_known_args(words)
    recipe, _ = job._asked(args)
    forget()
    return recipe


@pytest.mark.filterwarnings("ignore")
def test_the_result_is_a_smaller_model_of_the_same_class(workspace: Workspace, made: list[Stage], model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = workspace.path / "compressed"
    small, large = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "huggingface", model))
    assert type(small) is type(large)
    share = small.num_parameters() / large.num_parameters()
    assert 0.95 * 0.7 <= share <= 0.7
    found = report.collect(model, out, {})
    sizes = {name: each["parameters"] for name, each in found["models"].items()}
    assert sizes["original"] == large.num_parameters()
    assert sizes["pruned"] == sizes["distilled"] == small.num_parameters()
    assert found["models"]["distilled"]["tokens"] == 3 * 8 * 64

    # The loss that is reported is the exported model's own.
    tokenizer = AutoTokenizer.from_pretrained(out / "huggingface")
    assert tokenizer("def f(self):")["input_ids"]
    rows = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(small(rows).logits).all()


def test_the_report_says_what_came_out(workspace: Workspace, made: list[Stage], model: Path, tmp_path: Path) -> None:
    found = report.collect(model, workspace.path / "compressed", {"convert the model": 2.0})
    losses = {name: each["val_loss"] for name, each in found["models"].items()}
    text = report.headline(found)
    assert f"validation loss {losses['original']:.3f} to {losses['distilled']:.3f}" in text
    report.write(tmp_path, found, made, ["srun", "run"])
    page = (tmp_path / "report.md").read_text()
    assert text in page
    assert "convert the model, 2 s:" in page
    assert "srun run distill --distill-teacher" in page
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "compression.json").read_text())["models"]["pruned"]["val_loss"] == losses["pruned"]


def test_what_is_done_is_gone_on_with_and_another_one_is_refused(
    workspace: Workspace, made: list[Stage], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = workspace.path / "compressed", workspace.path / "data" / "text_document"
    words = ["compress", str(model), "--out", str(out), "--data-path", str(data), *FLAGS, "--dry-run"]
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert cli.main(words) == 0
    assert dict(os.environ) == before, "the ranks that are started later must not take themselves for others"
    assert signal.getsignal(signal.SIGTERM) == handler, "Megatron must not take the signals of this process"
    said = capsys.readouterr().out
    assert said.count("(done)") == len(made)
    assert "distillation:   3 steps of 512 tokens, 1,536 in all" in said
    forget()
    assert cli.main([*words, "--seed", "7"]) == 2
    assert "this directory holds another compression" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "0.001", "--tokens", "2K"], "no plan reaches the target"),
        (["--tokens", "2K"], "no target given"),
        (["--to", "0.5"], "no budget of tokens"),
        (["--to", "0.5", "--tokens", "2K", "--bff16"], "did you mean '--bf16'?"),
        (["--to", "0.5", "--tokens", "2K", "--save", "x"], "a compression says this itself"),
        (["--to", "0.5", "--tokens", "2K", "--prune-target-memory", "1"], "two budgets given"),
        (["--to", "0.5", "--tokens", "2K", "--data", "nowhere"], "no such file or directory"),
        (["--to", "0.5", "--tokens", "2K", "--processes", "0"], "--processes"),
        (["--to", "0.5", "--tokens", "2K", "--processes", "3", "--tensor-model-parallel-size", "3"], "does not divide"),
        (["--recipe", "nowhere.yaml"], "--recipe cannot be read"),
        (["--recipe", "nowhere.yaml", "--to", "0.5"], "the recipe says this"),
        (["--recipe", "nowhere.yaml", "--split", "9,1,0"], "the recipe says this"),
    ],
)
def test_what_would_end_a_later_stage_is_refused_first(
    model: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compress", str(model), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("done")
    assert cli.main(["compress", str(model), "--out", str(tmp_path), *FLAGS]) == 2
    assert "not empty and no compression" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
