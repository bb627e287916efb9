"""How many positions stay, for shares and for budgets, and that they are those of the highest scores."""

import pytest
import torch
from vision_oracle import SMALL

from megatron_ext.errors import PlanError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.pruning.scores import ImageScores
from megatron_ext.vision.pruning.targets import ImageTargets, make_plan


def random_scores(model: MambaVision) -> ImageScores:
    generator = torch.Generator().manual_seed(3)
    shapes = ImageScores.shapes(model)
    return ImageScores(
        values={name: torch.rand(s, generator=generator) for name, s in shapes.items()}, architecture=model
    )


@pytest.mark.parametrize(("name", "share"), [("mambavision-t", 0.5), ("mambavision-nano", 0.75)])
def test_a_budget_is_met_and_counted(name: str, share: float) -> None:
    """Never more, and less by no more than a step of all widths makes."""
    model = PRESETS[name]
    target = ImageTargets({}, params=share).resolve(model, range(len(model.pattern.replace("/", ""))))
    assert share * 0.93 < target.num_parameters() / model.num_parameters() <= share
    with torch.device("meta"):
        assert sum(p.numel() for p in Network(target).parameters()) == target.num_parameters()
    assert all(target.heads(stage) >= 1 and target.hidden(stage) % 8 == 0 for stage in range(4))


def test_the_highest_scores_stay() -> None:
    scores = random_scores(SMALL)
    targets = ImageTargets({"hidden": 0.5, "heads": 0.5}, blocks=4, depth_metric="loss", divisor=1)
    plan = make_plan(scores, SMALL, targets)
    depth = scores["depth.loss"]
    assert set(plan.units) == set(depth.argsort(descending=True)[:4].tolist())
    assert set(plan.kept) <= {"hidden", "heads"}
    for width, own in plan.kept.items():
        for block, kept in own.items():
            values = scores[f"blocks.{block}.{width}"]
            assert len(kept) == len(values) // 2
            assert values[list(kept)].min() > values[[i for i in range(len(values)) if i not in kept]].max()


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (ImageTargets({}), "no target given"), (ImageTargets({"hidden": 1.5}), "--prune-mlp-channels is a share"),
        (ImageTargets({}, params=0.01), "the budget cannot be reached"), (ImageTargets({}, blocks=7), "--prune-blocks"),
        (ImageTargets({}, params=0.5, divisor=0), "--prune-divisor"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(targets: ImageTargets, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        make_plan(random_scores(SMALL), SMALL, targets)
