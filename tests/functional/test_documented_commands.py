"""The commands of the pages run as they stand, at tiny sizes, and a second time: they go on, or say why not."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documented
import pytest
from documented import Command
from workspace import ROOT, Workspace

from megatron_ext.checkpoint import layout

SIZES = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"]
STEPS = ["--train-iters", "2", "--eval-iters", "1", "--save-interval", "1", "--eval-interval", "2"]
EXTENSION = str(Path(sys.executable).parent / "megatron-ext")
MODEL = ["--hybrid-layer-pattern", "M-*-", "--hidden-size", "64", "--ffn-hidden-size", "96"]


@pytest.fixture(scope="module")
def here(workspace: Workspace, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """What `make demo` and `megatron-ext data` leave, in small; of the data each sequence is read for a cache."""
    path = tmp_path_factory.mktemp("documented")
    here = Workspace(path, [])
    text = Path(shutil.__file__).read_text()
    lines = [json.dumps({"text": text[first : first + 300]}) for first in range(0, 60 * 300, 300)]
    (path / "texts.jsonl").write_text("\n".join(lines))
    own = ["--input", "texts.jsonl", "--tokenizer", str(workspace.path / "data" / "tokenizer")]
    (data,) = commands("pretrain", "megatron-ext", "data")
    here.run(EXTENSION, *data.words, *own)
    shutil.copytree(path / "runs" / "corpus", path / "runs" / "demo" / "data")
    for name in ("teacher", "pruned", "distilled"):
        shutil.copytree(workspace.path / teacher, path / "runs" / "demo" / name)
    for name in ("README.md", "docs"):
        (path / name).symlink_to(ROOT / name)
    return here


def commands(page: str, program: str, name: str | None = None) -> list[Command]:
    """Those of a page for a program, or for one of its subcommands; there are some."""
    every = documented.commands(ROOT / "docs" / f"{page}.md")
    found = [each for each in every if each.program == program and name in (None, each.words[0])]
    assert found
    return found


def trains_in_two_starts(here: Workspace, command: Command, *sizes: str) -> None:
    """The first start ends after a step, and the second goes on."""
    save = command.value("--save")
    shutil.rmtree(here.path / save, ignore_errors=True)  # another command's
    words = [*command.words, *SIZES, *STEPS, *sizes]
    here.run(command.program, *words, "--exit-interval", "1", ranks=command.ranks)
    assert [step["step"] for step in here.metrics(save)] == [1]
    here.run(command.program, *words, ranks=command.ranks)
    assert [step["step"] for step in here.metrics(save)] == [1, 2]
    assert layout.find(here.path / save).iteration == 2


def test_training_goes_on_and_at_longer_sequences(here: Workspace) -> None:
    (pretrain,) = [command for command in commands("pretrain", "pretrain_hybrid.py") if command.ranks > 1]
    trains_in_two_starts(here, pretrain, *MODEL)
    straight = [*pretrain.words, *SIZES, *STEPS, *MODEL, "--save", "runs/straight", "--load", "runs/straight"]
    here.run(pretrain.program, *straight, ranks=pretrain.ranks)
    losses = [[step["loss"] for step in here.metrics(run)] for run in ("runs/tiny", "runs/straight")]
    assert losses[0] == losses[1]
    for name in ("report", "verify"):
        (command,) = commands("pretrain", "megatron-ext", name)
        here.run(EXTENSION, *command.words)
    (longer,) = commands("long_context", "pretrain_hybrid.py")
    trains_in_two_starts(here, longer, "--seq-length", "64")


def test_distillation_goes_on_and_a_cache_stays_as_it_is(here: Workspace) -> None:
    for command in commands("distill", "distill_gpt.py"):
        if "--train-iters" in command.words:
            trains_in_two_starts(here, command)
            continue
        cache = here.path / command.value("--distill-cache-write")
        words = [*command.words, *SIZES, "--micro-batch-size", "4"]
        done = here.run(command.program, *words, ranks=command.ranks)
        stored = done.stdout.splitlines()[-1]
        before = contents(cache)
        again = here.run(command.program, *words, ranks=command.ranks)
        assert again.stdout.splitlines()[-1] == stored
        assert " 0.00 MB are missing" in again.stdout
        assert contents(cache) == before


def test_pruning_overwrites_nothing(here: Workspace) -> None:
    smaller = {"--prune-samples": "8", "--prune-num-layers": "2", "--prune-target-params": "0.46"}
    smaller |= dict(zip(SIZES[::2], SIZES[1::2], strict=True))
    for command in commands("prune", "prune_gpt.py"):
        words = [*command.words, *(word for flag in smaller if flag in command.words for word in (flag, smaller[flag]))]
        here.run(command.program, *words, ranks=command.ranks)
        refused(here, command, words, command.value("--save"), "the output exists already and is not overwritten")


SMALLER = {
    "generate": ["--max-new-tokens", "4"],
    "--speed": ["--speed", "16", "--batch-size", "2"],
    "--synthetic": ["--synthetic-lengths", "256", "--synthetic-samples", "2"],
}


@pytest.mark.parametrize("page", ["README.md", "docs/generate.md", "docs/evaluate.md"])
def test_models_of_the_demo_are_used_as_the_page_says(here: Workspace, page: str) -> None:
    """But for tasks, whose questions are downloaded, and a model that is."""
    for line in re.findall(r"^printf .*", (ROOT / page).read_text(), re.MULTILINE):
        subprocess.run(["bash", "-c", line], cwd=here.path, check=True)
    for command in documented.commands(ROOT / page):
        if "--tasks" in command.words or "runs/llama" in command.words:
            continue
        smaller = [word for what, words in SMALLER.items() if what in command.words for word in words]
        words = [*command.words, *smaller]
        here.run(EXTENSION, *words, ranks=command.ranks)
        if "--output" in command.words:
            refused(here, command, words, command.value("--output"), "is not overwritten")
        if command.words[0] == "convert":
            refused(here, command, words, "runs/demo/huggingface", "is not overwritten")


def refused(here: Workspace, command: Command, words: list[str], made: str, message: str) -> None:
    """A second start is refused in words, and loses nothing of what the first has made."""
    before = contents(here.path / made)
    program = EXTENSION if command.program == "megatron-ext" else command.program
    done = here.run(program, *words, ranks=command.ranks, ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(here.path / made) == before


def contents(path: Path) -> dict[Path, bytes]:
    """Every file of a directory, or the one file."""
    return {file: file.read_bytes() for file in (path, *path.rglob("*")) if file.is_file()}
