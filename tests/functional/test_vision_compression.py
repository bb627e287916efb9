"""`distill` and `prune` on image networks: the same commands as for language models, chosen by the checkpoint."""

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from vision_oracle import random_network, write_checkpoint
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.checkpoint import read_network
from megatron_ext.vision.images import Images, Variations
from megatron_ext.vision.network import Network
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.pruning.plan import ImagePlan
from megatron_ext.vision.pruning.scores import ImageScores
from megatron_ext.vision.sources import open_source

PROGRAM = "tests/support/vision_program.py"
IMAGES = [
    "--images-train", "train", "--images-valid", "valid", "--images-mixup", "0", "--images-cutmix", "0",
    "--micro-batch-size", "8", "--global-batch-size", "8",
]  # fmt: skip
TRAIN = [
    *IMAGES, "--lr", "1e-3", "--lr-decay-style", "constant", "--eval-iters", "1", "--eval-interval", "2",
    "--save-interval", "2", "--adam-eps", "0.01",
]  # fmt: skip
LESSON = ["--distill-teacher", "planted", "--distill-temperature", "2", "--distill-ce-weight", "1:0"]
BEGIN = ["--pretrained-checkpoint", "student"]
TP2 = ["--tensor-model-parallel-size", "2"]


# By stage the positions that never do anything, and block 4, which adds nothing; the others are C, C, M, S, M and S.
MODEL = replace(PRESETS["mambavision-nano"], pattern="C/C/MSSM/S", classes=4)
PLANTED = {
    "conv": {0: (3, 8), 1: (3, 8, 20, 31)}, "heads": {2: (1,), 3: (1, 6)}, "inner": {2: (0, 17)},
    "hidden": {2: (5, 6, 40), 3: (5, 6, 40, 300, 301, 511)},
}  # fmt: skip


def silence(network: Network) -> None:
    """Make them so: a channel whose activation is zero, a head whose values are, a block whose last layers are."""
    with torch.no_grad():
        for stage, own in enumerate(network.stages):
            for block in cast(Any, own).blocks:
                if hasattr(block, "conv1"):
                    for weight in (block.norm1.weight, block.norm1.bias):
                        weight[list(PLANTED["conv"][stage])] = 0
                    continue
                for weight in (block.fc1.weight, block.fc1.bias):
                    weight[list(PLANTED["hidden"][stage])] = 0
                if hasattr(block.mixer, "qkv"):
                    for weight in (block.mixer.qkv.weight, block.mixer.qkv.bias):
                        weight.unflatten(0, (-1, 3, 16))[list(PLANTED["heads"][stage]), 2] = 0
                else:
                    block.mixer.in_proj.weight.unflatten(0, (-1, 2))[list(PLANTED["inner"][stage])] = 0
        for layer in (network.stages[2].blocks[2].mixer.proj, network.stages[2].blocks[2].fc2):  # type: ignore[union-attr]
            layer.weight.zero_()
            layer.bias.zero_()


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pictures of three colours, a network with what is redundant in it, and a smaller one, both random."""
    path, generator = tmp_path_factory.mktemp("compression"), np.random.default_rng(0)
    for split, count in (("train", 8), ("valid", 8)):
        for channel, name in enumerate(("blue", "green", "red")):
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    planted, student = random_network(MODEL), random_network(replace(MODEL, pattern="C/C/M/S", dim=8, head_dim=8))
    silence(planted)
    for network, name in ((planted, "planted"), (student, "student")):
        network.head.weight.data.mul_(1e-3)  # type: ignore[union-attr]
        write_checkpoint(path / name, network)
    return Workspace(path, [])


def weights(wing: Workspace, run: str) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run)
    return {name: reader.read(name) for name in reader.shapes if name.startswith("backbone.")}


@pytest.fixture(scope="module")
def taught(wing: Workspace) -> list[dict[str, float]]:
    """Four steps of a smaller network that learns from the other, on one rank."""
    wing.run("distill_gpt.py", *TRAIN, *BEGIN, *LESSON, "--train-iters", "4", "--save", "whole")
    return wing.metrics("whole")


def test_a_student_minimises_both_losses(wing: Workspace, taught: list[dict[str, float]]) -> None:
    """The teacher is no part of what is saved; labels count from wholly to not at all."""
    for step, share in zip(taught, (0, 1 / 3, 2 / 3, 1), strict=True):
        hard = (step["total_loss"] - step["kd_loss"]) / (1 - share) if share < 1 else None
        assert step["kd_loss"] > 0
        assert hard is None or hard > 0.5  # with smoothed labels
    assert taught[3]["total_loss"] == pytest.approx(taught[3]["kd_loss"], rel=1e-6)
    assert "val_kd_loss" in taught[3]
    assert not [name for name in CheckpointReader(wing.path / "whole").shapes if "teacher" in name]


def test_a_distillation_goes_on_bit_for_bit(wing: Workspace, taught: list[dict[str, float]]) -> None:
    flags = [*TRAIN, *BEGIN, *LESSON, "--train-iters", "4", "--load", "twice", "--save", "twice"]
    wing.run("distill_gpt.py", *flags, "--exit-interval", "2")
    wing.run("distill_gpt.py", *flags)
    whole, twice = weights(wing, "whole"), weights(wing, "twice")
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    for name in ("kd_loss", "total_loss", "val_kd_loss"):
        assert [step.get(name) for step in wing.metrics("twice")] == [step.get(name) for step in taught]


def test_layout_and_precision_of_a_distillation(wing: Workspace, taught: list[dict[str, float]]) -> None:
    flags = [*TRAIN, *BEGIN, *LESSON, "--train-iters", "4", "--exit-interval", "2", "--save"]
    wing.run("distill_gpt.py", *flags, "tp", *TP2, ranks=2)
    halves = ["--micro-batch-size", "4", "--use-distributed-optimizer", "--bf16"]
    wing.run("distill_gpt.py", *flags, "dp", *halves, ranks=2)
    for run, tolerance in (("tp", 1e-4), ("dp", 5e-2)):
        for name in ("kd_loss", "total_loss", "val_kd_loss", "val_loss"):
            found, expected = ([s[name] for s in steps if name in s] for steps in (wing.metrics(run), taught[:2]))
            assert found == pytest.approx(expected, rel=tolerance), (run, name)


SCORED = [
    "--load", "planted", "--images-train", "train", "--prune-samples", "24", "--prune-divisor", "1",
    "--prune-conv-channels", "0.875", "--prune-attention-heads", "0.75", "--prune-mixer-channels", "0.9375",
    "--prune-mlp-channels", "0.98828125", "--prune-blocks", "6", "--prune-depth-metric", "logit_mse",
]  # fmt: skip


@pytest.fixture(scope="module")
def cut(wing: Workspace) -> ImageScores:
    """The scores of a network with what is redundant in it, from which as much was cut."""
    flags = ["--micro-batch-size", "24", "--global-batch-size", "24", "--save", "cut"]
    wing.run("prune_gpt.py", *SCORED, *flags)
    return ImageScores.load(wing.path / "cut" / "scores.safetensors")


def images(wing: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    samples = list(Images(open_source(wing.path / "train"), Variations(ImageOptions(), MODEL).validation, 3, 1))
    return torch.stack([s["image"] for s in samples]), torch.stack([s["label"] for s in samples])


def test_what_is_redundant_goes_and_nothing_is_lost(wing: Workspace, cut: ImageScores) -> None:
    plan = ImagePlan.load(wing.path / "cut" / "plan.json")
    assert plan.units == (0, 1, 2, 3, 5, 6)
    stages = (0, 1, 2, 2, 2, 2, 3)
    for width, own in plan.kept.items():
        for block, kept in own.items():
            whole = len(cut[f"blocks.{block}.{width}"])
            assert set(range(whole)) - set(kept) == set(PLANTED[width][stages[block]]), (width, block)
    pictures, labels = images(wing)
    with torch.no_grad():
        before, after = (read_network(wing.path / name).double()(pictures.double()) for name in ("planted", "cut"))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    loss = F.cross_entropy(before, labels).item()
    assert cut.loss == pytest.approx(loss, rel=1e-5)
    page = (wing.path / "cut" / "report.md").read_text()
    said = [line.split("|")[2:4] for line in page.splitlines() if line.startswith(("| original", "| pruned"))]
    assert [int(count.replace(",", "")) for count, _ in said] == [MODEL.num_parameters(), plan.target.num_parameters()]
    assert [float(nats) for _, nats in said] == pytest.approx([loss, loss], abs=1e-4)
    assert "| attention heads, in all | 16 | 9 | 56% |" in page
    for picture in ("importance.png", "loss.png"):
        assert (wing.path / "cut" / picture).is_file()


def test_scores_are_their_formulas(wing: Workspace, cut: ImageScores) -> None:
    """Of all images at once in float64; blocks replaced by the identity."""
    network, seen = read_network(wing.path / "planted").double(), dict[str, torch.Tensor]()
    blocks = [block for stage in network.stages for block in cast(Any, stage).blocks]
    watched = {"0.conv": blocks[0].conv2, "2.inner": blocks[2].mixer.out_proj, "2.hidden": blocks[2].fc2}
    watched |= {"3.heads": blocks[3].mixer.proj}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
        for name, layer in watched.items()
    ]
    pictures = images(wing)[0].double()
    with torch.no_grad():
        logits = network(pictures)
        for hook in hooks:
            hook.remove()
        each = {
            "0.conv": seen["0.conv"].abs().mean((2, 3)),
            "2.inner": seen["2.inner"].reshape(24, -1, 32, 2).norm(dim=-1).mean(1),
            "2.hidden": seen["2.hidden"].reshape(24, -1, 256).abs().mean(1),
            "3.heads": seen["3.heads"].reshape(24, -1, 4, 16).norm(dim=-1).mean(1),
        }
        for name, value in each.items():
            torch.testing.assert_close(cut[f"blocks.{name}"], value.norm(dim=0), rtol=1e-4, atol=1e-6, msg=name)
        for block, (stage, place) in {1: (1, 0), 3: (2, 1), 6: (3, 0)}.items():
            own = cast(Any, network.stages[stage]).blocks
            own[place], whole = torch.nn.Identity(), own[place]
            lost = (network(pictures) - logits).square().sum() / logits.square().sum()
            own[place] = whole
            assert cut["depth.logit_mse"][block].item() == pytest.approx(lost.item(), rel=1e-4)


@pytest.mark.parametrize("flags", [TP2, ["--micro-batch-size", "4"]], ids=["tp2", "dp2"])
def test_scores_do_not_depend_on_the_layout(wing: Workspace, cut: ImageScores, flags: list[str]) -> None:
    save = f"cut-{len(flags)}-{flags[1]}{flags[0][2]}"
    own = ["--micro-batch-size", "8", "--global-batch-size", "8", *flags, "--save", save]
    wing.run("prune_gpt.py", *SCORED, *own, ranks=2)
    found = ImageScores.load(wing.path / save / "scores.safetensors")
    assert found.values.keys() == cut.values.keys()
    for name in found.values:
        torch.testing.assert_close(found[name], cut[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert ImagePlan.load(wing.path / save / "plan.json").kept == ImagePlan.load(wing.path / "cut/plan.json").kept


def test_a_plan_is_applied_again_and_what_it_made_is_trained(wing: Workspace, cut: ImageScores) -> None:
    """By `distill` from the network it was cut out of; no image is needed for a plan."""
    wing.run("prune_gpt.py", "--load", "planted", "--prune-plan", "cut/plan.json", "--save", "again")
    first, second = weights(wing, "cut"), weights(wing, "again")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    lesson = ["--distill-teacher", "planted", "--pretrained-checkpoint", "again"]
    wing.run("distill_gpt.py", *IMAGES, *lesson, "--skip-train", "--save", "measured")
    found = json.loads((wing.path / "measured" / "results.json").read_text())["validation"]
    assert found["kd_loss"] == pytest.approx(0, abs=1e-6)
    wing.run("distill_gpt.py", *TRAIN, *lesson, "--train-iters", "1", "--save", "healed")
    model = read_network(wing.path / "healed").model
    assert model == ImagePlan.load(wing.path / "cut" / "plan.json").target
    assert not torch.equal(weights(wing, "healed")["backbone.head.weight"], first["backbone.head.weight"])


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["prune_gpt.py", "--load", "planted", "--prune-target-params", "0.5"], "no images to calibrate on"),
        (["prune_gpt.py", "--load", "planted", "--prune-hidden-size", "8"], "arguments: --prune-hidden-size"),
        (["distill_gpt.py", *TRAIN, *BEGIN, *LESSON, "--distill-states", "final"], "arguments: --distill-states"),
    ],
    ids=["images", "hidden-size", "states"],
)
def test_what_is_for_language_models_or_lacks_is_refused(wing: Workspace, flags: list[str], what: str) -> None:
    assert what in wing.run(*flags, "--save", "none", ok=False).stderr
