"""A plan for an image network: what it cuts is what a mask hides, and all of it can be counted, saved and refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vision_oracle import SMALL, random_network, write_checkpoint

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.plan import Plan
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.checkpoint import read_network
from megatron_ext.vision.pruning.plan import ImagePlan, pruned

# Blocks 0 and 1 are convolutions, 2 and 4 mixers, 3 and 5 attention; a mask zeroes what reads a position.
KEPT = {"conv": {1: (0, 2, 3, 9)}, "heads": {3: (1, 3)}, "inner": {4: (0, 5, 6, 30)}, "hidden": {2: (7,), 3: (90,)}}
ARMS = ("concatenated", "gated", "one-branch", "causal")


def plan_of(model: MambaVision, kept: dict[str, Any], units: tuple[int, ...] = tuple(range(6))) -> ImagePlan:
    counts = {width: {block: len(some) for block, some in own.items()} for width, own in kept.items()}
    return ImagePlan(source=model, target=pruned(model, units, counts), units=units, kept=kept)


def zero(weight: torch.Tensor, kept: tuple[int, ...], entries: int = 1) -> None:
    """The columns of all other positions, `entries` of them each."""
    for position in set(range(weight.shape[1] // entries)) - set(kept):
        weight[:, position * entries : (position + 1) * entries] = 0


@torch.no_grad()
def mask(network: nn.Module, model: MambaVision, width: str, block: int, kept: tuple[int, ...]) -> None:
    own: Any = [block for stage in network.stages for block in stage.blocks][block]  # type: ignore[union-attr]
    if width == "conv":
        zero(own.conv2.weight, kept)
    elif width == "hidden":
        zero(own.fc2.weight, kept)
    elif width == "heads":
        zero(own.mixer.proj.weight, kept, model.head_dim)
    else:
        zero(own.mixer.x_proj.weight, kept)
        zero(own.mixer.out_proj.weight, kept, 2 if model.mixer == "concatenated" else 1)


@pytest.mark.parametrize(("width", "arm"), [(width, ARMS[0]) for width in KEPT] + [("inner", arm) for arm in ARMS[1:]])
def test_what_is_cut_is_what_a_mask_hides(width: str, arm: str, tmp_path: Path) -> None:
    model = replace(SMALL, mixer=arm, layer_scale=0.5)
    network, images = random_network(model), torch.randn(2, 3, 40, 64)
    write_checkpoint(tmp_path / "whole", network)
    plan = plan_of(model, {width: KEPT[width]})
    apply(plan, tmp_path / "whole", tmp_path / "cut")
    cut = read_network(tmp_path / "cut")
    assert sum(p.numel() for p in cut.parameters()) == plan.target.num_parameters() < model.num_parameters()
    with torch.no_grad():
        whole = network(images)
        for block, kept in KEPT[width].items():
            mask(network, model, width, block, kept)
        torch.testing.assert_close(cut(images), network(images), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(whole, network(images), atol=1e-3)


def test_blocks_that_go_hand_on_what_comes_in(tmp_path: Path) -> None:
    """Together with widths of others; a stage may lose all of its blocks."""
    network, images = random_network(SMALL), torch.randn(2, 3, 64, 64)
    write_checkpoint(tmp_path / "whole", network)
    plan = plan_of(SMALL, {"heads": {3: (1,)}, "hidden": {2: (5, 7), 3: (0, 9)}}, units=(1, 2, 3))
    apply(plan, tmp_path / "whole", tmp_path / "cut")
    assert plan.target.pattern == "/C/MS/"
    with torch.no_grad():
        for width, block, kept in (("heads", 3, (1,)), ("hidden", 2, (5, 7)), ("hidden", 3, (0, 9))):
            mask(network, SMALL, width, block, kept)
        network.stages[0].blocks = network.stages[3].blocks = nn.ModuleList()
        torch.testing.assert_close(read_network(tmp_path / "cut")(images), network(images), rtol=1e-5, atol=1e-5)


def test_a_plan_that_keeps_everything_changes_nothing_and_the_average_is_cut_alike(tmp_path: Path) -> None:
    network = random_network(SMALL)
    write_checkpoint(tmp_path / "whole", network, averaged=True)
    apply(ImagePlan.keep_everything(SMALL), tmp_path / "whole", tmp_path / "same")
    whole, same = CheckpointReader(tmp_path / "whole"), CheckpointReader(tmp_path / "same")
    assert whole.shapes == same.shapes
    assert all(torch.equal(whole.read(key), same.read(key)) for key in whole.shapes)
    apply(plan_of(SMALL, KEPT), tmp_path / "whole", tmp_path / "cut")
    once, twice = (read_network(tmp_path / "cut", averaged=averaged).state_dict() for averaged in (False, True))
    assert all(torch.equal(2 * v, twice[name]) for name, v in once.items() if v.is_floating_point())


def test_a_plan_is_saved_and_two_become_one(tmp_path: Path) -> None:
    first = plan_of(SMALL, KEPT, units=(0, 1, 2, 3, 4))
    second = plan_of(first.target, {"conv": {1: (1, 2)}, "inner": {4: (2, 3)}}, (1, 2, 3, 4))
    both = first.then(second)
    assert both.kept["conv"] == {1: (2, 3)}
    assert both.kept["inner"] == {4: (6, 30)}
    assert both.kept["hidden"] == KEPT["hidden"]
    both.save(tmp_path / "plan.json")
    assert ImagePlan.load(tmp_path / "plan.json") == both
    with pytest.raises(PlanError, match="a plan has no 'family'"):
        Plan.load(tmp_path / "plan.json")
    network = random_network(SMALL)
    write_checkpoint(tmp_path / "whole", network)
    apply(first, tmp_path / "whole", tmp_path / "once")
    apply(second, tmp_path / "once", tmp_path / "twice")
    apply(both, tmp_path / "whole", tmp_path / "together")
    twice, together = (read_network(tmp_path / name).state_dict() for name in ("twice", "together"))
    assert all(torch.equal(value, together[name]) for name, value in twice.items())
    with pytest.raises(PlanError, match="the plan belongs to another model"):
        apply(second, tmp_path / "whole", tmp_path / "none")
    with pytest.raises(CheckpointError):
        read_network(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"units": ()}, "nothing is kept"),
        ({"kept": {"hidden": {2: (1, 0)}}}, "ascending order"),
        ({"kept": {"hidden": {2: (128,), 3: (0,)}}}, "out of range"),
        ({"kept": {"hidden": {2: (1,)}}}, "blocks of stage 3 keep different numbers"),
        ({"kept": {"hidden": {0: (1,)}}}, "has no such axis"),
        ({"kept": {"heads": {3: (1,)}}}, "does not make the target"),
        ({"kept": {"states": {2: (1,)}}}, "no such width"),
    ],
)
def test_what_is_no_plan_is_refused(change: dict, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        replace(ImagePlan.keep_everything(SMALL), **change)
