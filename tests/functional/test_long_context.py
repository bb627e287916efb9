"""A trained model goes on at a longer sequence, the same under context parallelism."""

import json
import os
import subprocess

import fork_server
import pytest
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext.checkpoint.resume import architecture_on_disk
from megatron_ext.evaluation.compare_rows import validation_differences
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.models.rope_extension import ntk_base

LONG = ["--seq-length", "256", "--train-iters", "3", "--global-batch-size", "2", "--micro-batch-size", "1"]
ROTARY = ["--rotary-base", "45000"]


def short(workspace: Workspace, name: str, *changes: str) -> str:
    """A model trained on 64 tokens, of `MODEL` with these changes."""
    directory = f"short-{name}"
    if not (workspace.path / directory).exists():
        flags = [*MODEL, *changes, *workspace.data, *TRAIN, "--train-iters", "2", "--save", directory]
        workspace.run("pretrain_hybrid.py", *flags, "--seq-length", "64")
    return directory


def extended(workspace: Workspace, source: str, name: str, *flags: str, ranks: int = 1) -> list[dict[str, float]]:
    command = ["--pretrained-checkpoint", source, "--load", name, "--save", name, *workspace.data, *TRAIN, *LONG]
    workspace.run("pretrain_hybrid.py", *command, *flags, ranks=ranks)
    return workspace.metrics(name)


@pytest.mark.parametrize(
    ("name", "changes", "flags"),
    [
        ("rotary", ["--hybrid-layer-pattern=*-*-"], ROTARY),
        ("none", ["--position-embedding-type", "none"], []),
    ],
    ids=["transformer with another base", "hybrid without positions"],
)
def test_context_parallel_ranks_see_one_long_sequence(
    workspace: Workspace, name: str, changes: list[str], flags: list[str]
) -> None:
    source = short(workspace, name, *changes)
    whole = extended(workspace, source, f"long-{name}", *flags)
    halves = extended(workspace, source, f"long-{name}-cp", *flags, "--context-parallel-size", "2", ranks=2)
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in halves] == pytest.approx([step[key] for step in whole], rel=2e-5)
    saved = architecture_on_disk(workspace.path / f"long-{name}-cp")
    assert saved.max_position_embeddings == 256
    assert saved.rotary_base == (45000 if flags else 10000)


def test_rotary_positions_that_do_not_reach_are_refused_with_a_base(workspace: Workspace) -> None:
    source = short(workspace, "rotary", "--hybrid-layer-pattern=*-*-")
    command = ["--pretrained-checkpoint", source, "--save", "long-refused", *workspace.data, *TRAIN, *LONG]
    done = workspace.run("pretrain_hybrid.py", *command, ok=False)
    base = ntk_base(architecture_on_disk(workspace.path / source), 256)
    assert f"--rotary-base {base}" in done.stderr
    assert not (workspace.path / "long-refused").exists()


def test_a_run_does_not_go_on_with_another_base(workspace: Workspace) -> None:
    source = short(workspace, "rotary", "--hybrid-layer-pattern=*-*-")
    command = ["--load", source, "--save", source, *workspace.data, *TRAIN, "--train-iters", "4", *ROTARY]
    done = workspace.run("pretrain_hybrid.py", *command, ok=False)
    assert "rotary_base=45000 instead of 10000" in done.stderr
    assert "--pretrained-checkpoint" in done.stderr


def test_the_longer_model_is_evaluated_at_its_length(workspace: Workspace) -> None:
    source = short(workspace, "rotary", "--hybrid-layer-pattern=*-*-")
    if not (workspace.path / "long-rotary").exists():
        extended(workspace, source, "long-rotary", *ROTARY)
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", "long-rotary", "--skip-train", "--save",
                  "long-measured", "--save-interval", "1", *workspace.data, "--seq-length", "256")  # fmt: skip
    results = json.loads((workspace.path / "long-measured" / "results.json").read_text())
    found = results["validation"]
    assert found["tokens"] == found["sequences"] * 256 == found["settings"]["tokens"]
    assert (found["loss"], results["checkpoint"]["path"]) == (results["val_loss"], str(workspace.path / "long-rotary"))
    # The same for a comparison as for a report; the training's own is of less of the split, and another loss.
    run, training = (Run.read(workspace.path / name, name) for name in ("long-measured", "long-rotary"))
    assert run.validation == found
    assert set(validation_differences([run, training])) >= {"tokens", "source"}


@pytest.mark.parametrize(("recipe", "length", "ranks"), [("16k", 16384, 4), ("32k", 32768, 8), ("128k", 131_072, 32)])
def test_the_recipes_fit_the_published_hybrid(recipe: str, length: int, ranks: int) -> None:
    """The flags that run.sh starts, with the model's name in the place of its checkpoint."""
    text = (ROOT / "examples" / "long_context" / "recipes" / f"{recipe}.flags").read_text()
    flags = [word for line in text.splitlines() if not line.startswith("#") for word in line.split()]
    parallel = ["--tensor-model-parallel-size", "4", "--sequence-parallel", "--bf16", "--use-distributed-optimizer"]
    model = ["--preset", "mamba2-hybrid-8b", "--max-position-embeddings", str(length), "--micro-batch-size", "1"]
    command = ["pretrain_hybrid.py", *model, *flags, *parallel, "--mock-data", "--dry-run"]
    done = fork_server.run([ROOT / command[0], *command[1:]])
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert f"x {length:,} =" in shown.replace(f"x {length} =", f"x {length:,} =")
    assert "4,194,304 tokens a step" in shown
    assert f"{ranks} ranks = tensor 4 x pipeline 1 x context {ranks // 4}" in shown


def test_the_script_starts_what_the_recipe_says(tmp_path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\necho "$*"\n')
    stand_in.chmod(0o755)
    given = {
        "MODEL": "/m",
        "SAVE": "/s",
        "DATA": "/d",
        "PYTHON": str(stand_in),
        "NNODES": "4",
        "MASTER_ADDR": "node1",
        "PATH": os.environ["PATH"],
    }
    command = ["bash", str(ROOT / "examples" / "run.sh"), "long_context/16k", "--rotary-base", "42000"]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert "--nproc-per-node 8 --nnodes 4 " in done.stdout
    assert "pretrain_hybrid.py --pretrained-checkpoint /m --load /s --save /s " in done.stdout
    assert " --seq-length 16384 " in done.stdout
    assert done.stdout.rstrip().endswith("--rotary-base 42000")
