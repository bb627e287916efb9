"""A linear sub-layer, a kind of ours: any layout trains it the same, it resumes, runs with caches, and is cut."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import random_weights
from workspace import TRAIN, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.pruning.plan import Plan

LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "tp2-replicated": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2-dp2": (4, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M-L|*LM-"]),
}


@pytest.fixture(scope="module")
def source(workspace: Workspace, teacher: str) -> str:
    """Random weights of a model with two linear sub-layers."""
    step = layout.find(workspace.path / teacher).path
    arch = replace(layout.architecture(step), pattern="M-L*LM-", linear_rank=4)
    with writing(workspace.path / "linear", arch, layout.common(step)["args"]) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.float())
    return "linear"


def train_on(workspace: Workspace, source: str, name: str, *more: str) -> str:
    ranks, flags = LAYOUTS[name]
    # Adam would move a weight whose gradient is next to nothing, and all rounding, as far as any other.
    flags = [*TRAIN, *flags, "--optimizer", "sgd", "--lr", "0.1", "--min-lr", "0.1"]
    flags += ["--train-iters", "2", "--eval-iters", "0", "--save", f"linear-{name}", *more]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", source, *workspace.data, *flags, ranks=ranks)
    return f"linear-{name}"


@pytest.fixture(scope="module")
def trained(workspace: Workspace, source: str) -> str:
    return train_on(workspace, source, "one")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_any_layout_trains_the_same(workspace: Workspace, source: str, trained: str, name: str) -> None:
    other = train_on(workspace, source, name)
    for step, expected in zip(workspace.metrics(other), workspace.metrics(trained), strict=True):
        for value in ("loss", "grad_norm"):
            assert step[value] == pytest.approx(expected[value], rel=1e-5)
    left, right = CheckpointReader(workspace.path / other), CheckpointReader(workspace.path / trained)
    assert left.shapes == right.shapes == axes.tensors(layout.architecture(right.step.path))
    for key in left.shapes:
        torch.testing.assert_close(left.read(key), right.read(key), rtol=0, atol=1e-5)
    key = "decoder.layers.2.down"
    assert float((right.read(key) - CheckpointReader(workspace.path / source).read(key)).abs().max()) > 1e-3


def test_it_goes_on_where_it_was(workspace: Workspace, source: str) -> None:
    """One step, and one more from what it saved, are two steps, bit for bit."""
    adam = ["--optimizer", "adam", "--lr", "2e-3", "--min-lr", "0"]
    train_on(workspace, source, "one", *adam, "--save", "linear-whole")
    half = [*adam, "--save", "linear-half"]
    train_on(workspace, source, "one", *half, "--exit-interval", "1", "--save-interval", "1")
    train_on(workspace, source, "one", "--load", "linear-half", *half)
    left, right = (CheckpointReader(workspace.path / f"linear-{name}") for name in ("half", "whole"))
    assert left.step.iteration == right.step.iteration == 2
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)


def test_it_is_cut_like_any_other(workspace: Workspace, source: str) -> None:
    """Its channels go with those of the stream, and it goes itself where layers of its kind are the least important."""
    flags = ["--prune-samples", "8", "--prune-hidden-size", "48", "--prune-num-sublayers", "6"]
    workspace.run("prune_gpt.py", "--load", source, "--save", "linear-cut", *workspace.data, *flags)
    plan = Plan.load(workspace.path / "linear-cut" / "plan.json")
    reader = CheckpointReader(workspace.path / "linear-cut")
    assert len(plan.target.pattern) == 6
    place = plan.target.pattern.index("L")
    whole = CheckpointReader(workspace.path / source).read(f"decoder.layers.{plan.units[place]}.down")
    torch.testing.assert_close(reader.read(f"decoder.layers.{place}.down"), whole[:, list(plan.hidden or ())])


def test_it_generates(workspace: Workspace, source: str) -> None:
    """With caches, which it needs none of, and on two stages."""
    command = str(Path(sys.executable).parent / "megatron-ext")
    flags = ["generate", source, "--prompt", "def main", "--max-new-tokens", "6"]
    split = ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M-L|*LM-"]
    done = [workspace.run(command, *flags), workspace.run(command, *flags, *split, ranks=2)]
    assert len(done[0].stdout) > len("def main\n")
    assert done[0].stdout == done[1].stdout
