"""`distill` and `prune` on image networks: the same commands as for language models, chosen by the checkpoint."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader

PROGRAM = "tests/support/vision_program.py"
IMAGES = [
    "--images-train", "train", "--images-valid", "valid", "--images-mixup", "0", "--images-cutmix", "0",
    "--micro-batch-size", "8", "--global-batch-size", "8",
]  # fmt: skip
TRAIN = [
    *IMAGES, "--lr", "1e-3", "--lr-decay-style", "constant", "--eval-iters", "1", "--eval-interval", "2",
    "--save-interval", "2", "--adam-eps", "0.01",
]  # fmt: skip
NANO = ["--preset", "mambavision-nano", "--mambavision-classes", "4"]
STUDENT = [*NANO, "--mambavision-pattern", "C/C/M/S", "--mambavision-dim", "8", "--mambavision-head-dim", "8"]
LESSON = ["--distill-teacher", "teacher", "--distill-temperature", "2", "--distill-ce-weight", "1:0"]
TP2 = ["--tensor-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pictures of three colours, and a network of two tensor-parallel ranks that has seen a few of them."""
    path, generator = tmp_path_factory.mktemp("compression"), np.random.default_rng(0)
    for split, count in (("train", 8), ("valid", 8)):
        for channel, name in enumerate(("blue", "green", "red")):
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    workspace = Workspace(path, [])
    workspace.run(PROGRAM, *TRAIN, *NANO, *TP2, "--train-iters", "4", "--save", "teacher", ranks=2)
    return workspace


def weights(wing: Workspace, run: str) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run)
    return {name: reader.read(name) for name in reader.shapes if name.startswith("backbone.")}


@pytest.fixture(scope="module")
def taught(wing: Workspace) -> list[dict[str, float]]:
    """Four steps of a smaller network that learns from the other, on one rank."""
    wing.run("distill_gpt.py", *TRAIN, *STUDENT, *LESSON, "--train-iters", "4", "--save", "whole")
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
    flags = [*TRAIN, *STUDENT, *LESSON, "--train-iters", "4", "--load", "twice", "--save", "twice"]
    wing.run("distill_gpt.py", *flags, "--exit-interval", "2")
    wing.run("distill_gpt.py", *flags)
    whole, twice = weights(wing, "whole"), weights(wing, "twice")
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    for name in ("kd_loss", "total_loss", "val_kd_loss"):
        assert [step.get(name) for step in wing.metrics("twice")] == [step.get(name) for step in taught]


def test_layout_and_precision_of_a_distillation(wing: Workspace, taught: list[dict[str, float]]) -> None:
    flags = [*TRAIN, *LESSON, "--pretrained-checkpoint", "whole", "--train-iters", "2", "--save"]
    wing.run("distill_gpt.py", *flags, "alone")
    wing.run("distill_gpt.py", *flags, "tp", *TP2, ranks=2)
    halves = ["--micro-batch-size", "4", "--use-distributed-optimizer", "--bf16"]
    wing.run("distill_gpt.py", *flags, "dp", *halves, ranks=2)
    for run, tolerance in (("tp", 1e-4), ("dp", 5e-2)):
        for name in ("kd_loss", "total_loss", "val_kd_loss", "val_loss"):
            found, expected = ([s[name] for s in wing.metrics(each) if name in s] for each in (run, "alone"))
            assert found == pytest.approx(expected, rel=tolerance), (run, name)


def test_a_network_has_nothing_to_learn_from_itself(wing: Workspace) -> None:
    flags = ["--distill-teacher", "teacher", "--pretrained-checkpoint", "teacher", "--skip-train", "--save", "itself"]
    wing.run("distill_gpt.py", *IMAGES, *flags)
    found = json.loads((wing.path / "itself" / "results.json").read_text())["validation"]
    assert found["kd_loss"] == pytest.approx(0, abs=1e-6)
    assert found["loss"] > 0.1


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([*NANO, "--mambavision-classes", "5"], "teacher and student have not the same classes"),
        ([*NANO, "--distill-states", "final"], "unrecognized arguments: --distill-states"),
        ([*NANO, "--distill-kd-weight", "0"], "nor both zero"),
        (["--preset", "tiny-hybrid"], "unknown preset 'tiny-hybrid'"),
    ],
)
def test_what_a_distillation_refuses(wing: Workspace, flags: list[str], what: str) -> None:
    teacher = ["--distill-teacher", "teacher", "--train-iters", "1", "--dry-run"]
    assert what in wing.run("distill_gpt.py", *TRAIN, *teacher, *flags, ok=False).stderr
