"""Each example trains or cuts a tiny model on a CPU with its own flags: bf16, overlap, distributed optimizer."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from workspace import MODEL, ROOT, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.resume import architecture_on_disk

PYTHON = '#!/usr/bin/env bash\nprintf "%q " "$@" > "$NOTES"\n'
SIZES = ["--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "8", "--split", "90,10,0"]
VOCABULARY = ["--padded-vocab-size", "512", "--make-vocab-size-divisible-by", "8"]
STEPS = ["--train-iters", "2", "--lr-warmup-iters", "1", "--eval-iters", "1", "--save-interval", "1"]
RUN = {
    "pretrain": ["mamba2-hybrid-8b"],
    "distill": ["mn-minitron-8b"],
    "prune": ["minitron-4b", "nemotron-h-4b", "llama3.1-minitron-4b-depth"],
    "long_context": ["16k", "32k"],
}
"""What the tests below run; in the other recipes only sizes are others, and those are smaller here anyway."""


@pytest.fixture
def recipe(workspace: Workspace, tmp_path: Path):
    """The command line that an example's script ends in, with a stand-in for Python, on two ranks."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def command(recipe: str, *arguments: str, **settings: str) -> tuple[str, list[str]]:
        environment = {"PYTHON": str(python), "NOTES": str(tmp_path / "notes"), "GPUS_PER_NODE": "2"}
        environment |= {"DATA": str(workspace.path / "data"), "MICRO_BATCH": "2", **settings}
        subprocess.run([ROOT / "examples" / "run.sh", recipe, *arguments], env=os.environ | environment, check=True)
        words = shlex.split((tmp_path / "notes").read_text())
        assert words[:3] == ["-m", "megatron_ext", "torchrun"]
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[words.index("--nproc-per-node") + 1] == "2"
        return words[at], words[at + 1 :]

    return command


def test_the_other_recipes_have_no_other_flags() -> None:
    for folder in (ROOT / "examples").glob("*/recipes"):
        flags = {path.stem: set(re.findall(r"^--\S+", path.read_text(), re.M)) for path in folder.glob("*.flags")}
        run = [flags[name] for name in RUN[folder.parent.name]]
        assert [name for name in flags if not any(flags[name] <= others for others in run)] == [], folder


def test_the_8b_hybrid_trains_and_goes_on(workspace: Workspace, recipe) -> None:
    program, flags = recipe("pretrain/mamba2-hybrid-8b", SAVE="recipe-8b", TENSOR_PARALLEL="1", TRAIN_ITERS="4")
    overlapped = {"--overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer"}
    assert {"--bf16", "--cross-entropy-loss-fusion", *overlapped} <= set(flags)
    tiny = [*flags, *MODEL, *SIZES, *VOCABULARY, "--eval-iters", "1", "--lr-warmup-iters", "1"]
    workspace.run(program, *tiny, "--exit-interval", "2", ranks=2)
    assert layout.find(workspace.path / "recipe-8b").iteration == 2
    workspace.run(program, *tiny, ranks=2)
    assert [step["step"] for step in workspace.metrics("recipe-8b")] == [1, 2, 3, 4]


def test_a_distillation_corrects_its_teacher_and_trains(workspace: Workspace, teacher: str, recipe) -> None:
    settings = {"TEACHER": teacher, "STUDENT": teacher, "SAVE": "recipe-distilled"}
    program, flags = recipe("distill/mn-minitron-8b", **settings)
    assert "--bf16" in flags
    workspace.run(program, *flags, *SIZES, *VOCABULARY, *STEPS, ranks=2)
    save = workspace.path / "recipe-distilled"
    assert layout.find(save).iteration == layout.find(save / "teacher").iteration == 2


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("minitron-4b", ["--prune-num-attention-heads", "2"]),
        ("nemotron-h-4b", ["--prune-mamba-num-heads", "4"]),
    ],
)
def test_a_cut_is_made(workspace: Workspace, teacher: str, recipe, tmp_path: Path, name: str, heads: list[str]) -> None:
    save = str(tmp_path / name)
    program, flags = recipe(f"prune/{name}", LOAD=teacher, SAVE=save)
    assert "--bf16" in flags
    cut = ["--prune-hidden-size", "48", "--prune-ffn-hidden-size", "64", *heads, "--prune-samples", "8"]
    workspace.run(program, *flags, *SIZES, *VOCABULARY, *cut, ranks=2)
    made = architecture_on_disk(Path(save))
    assert (made.hidden_size, made.ffn_hidden_size) == (48, 64)
    assert getattr(made, heads[0].removeprefix("--prune-").replace("-", "_")) == int(heads[1])


def test_layers_go_by_a_task(workspace: Workspace, teacher: str, recipe, tmp_path: Path) -> None:
    """By choices instead of Winogrande, which is downloaded."""
    task = ["--prune-task", "megatron_ext.evaluation.synthetic:copying_choice"]
    program, flags = recipe("prune/llama3.1-minitron-4b-depth", *task, LOAD=teacher, SAVE=str(tmp_path / "depth"))
    assert flags[flags.index("--prune-task") + 1] == "lm_eval:winogrande"
    cut = ["--prune-num-layers", "2", "--prune-samples", "8"]
    workspace.run(program, *flags, *SIZES, *VOCABULARY, *cut, ranks=2)
    assert len(architecture_on_disk(tmp_path / "depth").layers.blocks) == 2
    assert f"at the task `{task[1]}`" in (tmp_path / "depth" / "report.md").read_text()


@pytest.mark.parametrize(("name", "context_parallel", "tensor_parallel"), [("16k", "1", "2"), ("32k", "2", "1")])
def test_a_model_learns_longer_contexts(
    workspace: Workspace, teacher: str, recipe, tmp_path: Path, name: str, context_parallel: str, tensor_parallel: str
) -> None:
    save = str(tmp_path / name)
    program, flags = recipe(f"long_context/{name}", MODEL=teacher, SAVE=save, TENSOR_PARALLEL=tensor_parallel)
    assert flags[flags.index("--context-parallel-size") + 1] == context_parallel
    assert ("--sequence-parallel" in flags) == (tensor_parallel == "2")
    length = ["--seq-length", "128", "--rotary-base", "30000", "--global-batch-size", "4", "--split", "90,10,0"]
    workspace.run(program, *flags, *length, *VOCABULARY, *STEPS, ranks=2)
    assert layout.find(Path(save)).iteration == 2
