"""Whatever ends a pruning job, the same command goes on from the scores and leaves what an undisturbed one does."""

import signal
from pathlib import Path
from typing import Any

import fork_server
import torch
from safetensors import safe_open
from workspace import ROOT, Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.pruning.scores import Scores

ROUNDS = [
    "--prune-samples", "8", "--prune-hidden-size", "32", "--prune-ffn-hidden-size", "48", "--prune-num-layers", "2",
    "--prune-iterations", "2", "--prune-depth-metric", "loss",
]  # fmt: skip
# Runs the program until a function is called for the n-th time, and dies there as if the machine had gone.
DYING = f"""
import importlib, os, runpy, signal, sys

module, function, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = importlib.import_module(module)
real = getattr(module, function)
def dying(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, function, dying)
sys.argv[:4] = [{str(ROOT / "prune_gpt.py")!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
JOB, WRITER = "megatron_ext.pruning.job", "megatron_ext.checkpoint.writer"
PLANS = "megatron_ext.pruning.language_models"


def content(run: Path) -> dict[str, Any]:
    """The files but for the checkpoint; of scores what they say, as what is in their headers has no order."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.parent.name != "release"}
    names -= {"config.yaml", "checksums.json"}  # which says --save; of which it is, too
    return {name: scores_in(run / name) if "scores" in name else (run / name).read_bytes() for name in names}


def scores_in(path: Path) -> dict[str, Any]:
    scores = Scores.load(path)
    return vars(scores) | {"values": {name: value.tolist() for name, value in scores.values.items()}}


def test_a_job_that_dies_goes_on_as_if_nothing_had_been(workspace: Workspace, teacher: str) -> None:
    """Killed again and again, in two rounds, between them, and when all is there but the name."""
    flags = ["--load", teacher, *workspace.data, *ROUNDS]
    workspace.run("prune_gpt.py", *flags, "--save", "undisturbed")
    script = workspace.path / "dying.py"
    script.write_text(DYING)
    deaths = [
        (PLANS, "make_plan", "1"),  # the first round is scored
        ("megatron_ext.pruning.calibration", "measure", "1"),  # the second is being scored
        (WRITER, "check_tensors", "1"),  # the model between them is being written
        (JOB, "publish", "1"),
    ]
    scored = []
    for death in deaths:
        done = fork_server.run([script, *death, *flags, "--save", "disturbed"], 1, workspace.path)
        assert done.returncode == -signal.SIGKILL, (death, done.stdout[-500:], done.stderr[-2000:])
        assert not (workspace.path / "disturbed").exists()
        scored.append(done.stdout.count("scored 8 sequences"))
    # Each round is scored once; only what was interrupted in its calibration is scored again.
    assert scored == [1, 1, 0, 1]
    done = workspace.run("prune_gpt.py", *flags, "--save", "disturbed")
    assert "scored 8 sequences" not in done.stdout
    left, right = (workspace.path / name for name in ("undisturbed", "disturbed"))
    assert content(left) == content(right)
    settings = [(run / "config.yaml").read_text().replace(f"save: {run.name}\n", "") for run in (left, right)]
    assert settings[0] == settings[1]
    weights = CheckpointReader(left), CheckpointReader(right)
    assert weights[0].shapes == weights[1].shapes
    assert all(torch.equal(weights[0].read(key), weights[1].read(key)) for key in weights[0].shapes)
    assert [path.name for path in workspace.path.glob(".disturbed*")] == []


def test_scores_outlive_what_comes_after_them(workspace: Workspace, teacher: str) -> None:
    """Such as a budget that the layers that were chosen cannot reach; other targets then need no calibration."""
    save, ranks = "poor", 2
    flags = ["--load", teacher, "--save", save, *workspace.data, "--prune-samples", "8", "--prune-num-layers", "2"]
    script = workspace.path / "failing.py"
    raised = "from megatron_ext.errors import PlanError; raise PlanError('no plan reaches the target')"
    script.write_text(DYING.replace("os.kill(os.getpid(), signal.SIGKILL)", raised))
    done = fork_server.run([script, PLANS, "make_plan", "1", *flags], ranks, workspace.path)
    assert done.returncode == 2
    assert "no plan reaches the target" in done.stderr
    assert not (workspace.path / save).exists()
    (kept,) = workspace.path.glob(f".{save}.scores-*.safetensors")
    assert str(kept.name) in done.stdout
    with safe_open(kept, framework="pt") as file:
        assert "depth.block_influence.blocks" in file.keys()  # noqa: SIM118
    # Of other settings they are not taken, and are left alone.
    other = workspace.run("prune_gpt.py", *flags, "--seed", "5", ranks=ranks)
    assert "scored 8 sequences" in other.stdout
    assert kept.exists()
    (workspace.path / save).rename(workspace.path / f"{save}-seed-5")
    done = workspace.run("prune_gpt.py", *flags, "--prune-hidden-size", "48", ranks=ranks)
    assert "scored 8 sequences" not in done.stdout
    assert {"report.md", "loss.png", "scores.safetensors"} <= content(workspace.path / save).keys()
    assert not list(workspace.path.glob(f".{save}*"))


def test_magnitudes_run_no_model_and_any_processes_find_the_same(workspace: Workspace, teacher: str) -> None:
    flags = ["--load", teacher, "--prune-width-metric", "magnitude", "--prune-hidden-size", "32"]
    for ranks in (1, 2):
        done = workspace.run("prune_gpt.py", *flags, *workspace.data, "--save", f"light-{ranks}", ranks=ranks)
        assert "sequences" not in done.stdout
    left, right = (CheckpointReader(workspace.path / f"light-{ranks}") for ranks in (1, 2))
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)
