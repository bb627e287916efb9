"""Depth recovery: what stands for dropped sub-layers is the same on any layout, is applied, replayed, and trains on."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.recovery import FILE

LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "tp2-replicated": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2-dp2": (4, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M-|*-M-"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
}
Tensors = dict[str, torch.Tensor]
DROP = ["--prune-samples", "16", "--prune-num-sublayers", "3"]
LOW_RANK = [*DROP, "--prune-recover", "low-rank", "--prune-recover-rank", "8", "--prune-recover-skip", "3"]
LOW_RANK += ["--prune-recover-stream", "pruned"]


def prune(workspace: Workspace, teacher: str, save: str, *flags: str, ranks: int = 1) -> Tensors:
    workspace.run("prune_gpt.py", "--load", teacher, "--save", save, *workspace.data, *flags, ranks=ranks)
    path = workspace.path / save / FILE
    return load_file(path) if path.is_file() else {}


def pruned_loss(workspace: Workspace, run: str) -> float:
    lines = (workspace.path / run / "report.md").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("| pruned")).split("|")[-2])


@pytest.fixture(scope="module")
def low_rank(workspace: Workspace, teacher: str) -> Tensors:
    return prune(workspace, teacher, "low-rank", *LOW_RANK)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_nothing(workspace: Workspace, teacher: str, low_rank: Tensors, name: str) -> None:
    ranks, flags = LAYOUTS[name]
    other = prune(workspace, teacher, f"low-rank-{name}", *LOW_RANK, *flags, ranks=ranks)
    assert other.keys() == low_rank.keys()
    for key in (key.removesuffix(".up") for key in low_rank if key.endswith(".up")):
        maps = [each[f"{key}.up"] @ each[f"{key}.down"] for each in (other, low_rank)]
        torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-3 * float(maps[1].abs().max()))
        for part in ("bias", "explained"):
            torch.testing.assert_close(other[f"{key}.{part}"], low_rank[f"{key}.{part}"], rtol=1e-4, atol=1e-6)
    assert pruned_loss(workspace, f"low-rank-{name}") == pytest.approx(pruned_loss(workspace, "low-rank"), abs=2e-4)


def test_the_run_says_what_can_be_emulated(workspace: Workspace, low_rank: Tensors) -> None:
    run = workspace.path / "low-rank"
    plan = Plan.load(run / "plan.json")
    assert plan.recovery is not None
    assert (plan.recovery.rank, plan.recovery.skip, plan.recovery.into) == (8, 3, "units")
    assert plan.target.pattern.count("L") == 3
    report = (run / "report.md").read_text()
    assert "a linear map of rank 8 and a bias" in report
    rows = [line for line in report.splitlines() if line.startswith(tuple(f"| {unit} |" for unit in plan.emulated))]
    for (unit, emulator), row in zip(sorted(plan.emulators.items()), rows, strict=True):
        assert row.split("|")[-2].strip() == f"{float(emulator.explained[-1]):.1%}", unit
    assert (run / "recovery.png").stat().st_size > 0


def test_a_plan_is_replayed_without_data(workspace: Workspace, teacher: str, low_rank: Tensors) -> None:
    """Bit for bit, from the tensors beside it; without them, or with others, it is refused."""
    again = ["prune_gpt.py", "--load", teacher, "--save"]
    workspace.run(*again, "replayed", "--prune-plan", "low-rank/plan.json")
    left, right = (CheckpointReader(workspace.path / run) for run in ("low-rank", "replayed"))
    assert left.shapes == right.shapes
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)
    assert (workspace.path / "replayed" / FILE).read_bytes() == (workspace.path / "low-rank" / FILE).read_bytes()
    (workspace.path / "plan-alone").mkdir()
    shutil.copy(workspace.path / "low-rank" / "plan.json", workspace.path / "plan-alone")
    done = workspace.run(*again, "refused", "--prune-plan", "plan-alone/plan.json", ok=False)
    assert "recovery.safetensors beside the plan" in done.stderr
    (workspace.path / "plan-alone" / FILE).write_bytes(b"other")
    done = workspace.run(*again, "refused", "--prune-plan", "plan-alone/plan.json", ok=False)
    assert "not its own" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.path / "refused").exists()


def test_scores_and_plans_can_be_recovered_later(workspace: Workspace, teacher: str, low_rank: Tensors) -> None:
    """What a plan drops, or what scores made earlier choose, is fitted with data, and nothing is scored again."""
    bias = ["--prune-recover", "bias", "--prune-recover-samples", "16"]
    by_scores = ["--prune-scores", "low-rank/scores.safetensors", "--prune-num-sublayers", "3"]
    found = prune(workspace, teacher, "by-scores", *by_scores, *bias)
    plan = Plan.load(workspace.path / "by-scores" / "plan.json")
    target = replace(plan.target, pattern=plan.target.pattern.replace("L", ""), linear_rank=0)
    bare = replace(plan, recovery=None, emulated={}, target=target)
    bare.save(workspace.path / "bare.json")
    other = prune(workspace, teacher, "by-plan", "--prune-plan", "bare.json", *bias, ranks=2)
    assert found.keys() == other.keys()
    for key, value in found.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)
    done = workspace.run(
        "prune_gpt.py", "--load", teacher, "--save", "refused", *workspace.data, "--prune-plan", "low-rank/plan.json",
        *bias, ok=False,
    )  # fmt: skip
    assert "the plan has its own recovery" in done.stderr


def test_it_learns_from_the_model_that_it_was(workspace: Workspace, teacher: str, low_rank: Tensors) -> None:
    """Distilled on two ranks, the maps move."""
    flags = ["--distill-teacher", teacher, "--load", "low-rank", "--finetune", "--lr", "1e-3", "--train-iters", "2"]
    flags += ["--eval-iters", "0", "--save-interval", "2", "--save", "low-rank-distilled"]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    workspace.run("distill_gpt.py", *workspace.data, *flags, *split, ranks=2)
    reader, before = (CheckpointReader(workspace.path / run) for run in ("low-rank-distilled", "low-rank"))
    assert reader.shapes == before.shapes
    maps = [key for key in reader.shapes if key.endswith((".up", ".down"))]
    assert len(maps) == 6
    assert not any(torch.equal(reader.read(key), before.read(key)) for key in maps)


def test_a_dry_run_says_what_fitting_takes(workspace: Workspace, teacher: str) -> None:
    done = workspace.run("prune_gpt.py", "--load", teacher, "--save", "dry", *workspace.data, *LOW_RANK, "--dry-run")
    assert "3 passes over 16 sequences at most, 1 sub-layers at a time" in done.stdout
    assert "3,264 parameters at most" in done.stdout  # three maps of 64 x 8 twice and 64
