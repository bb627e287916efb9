"""`megatron-ext vision-segment` from a folder to a measured checkpoint: it learns, resumes, and no layout matters."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.downstream.colours import normalised
from megatron_ext.vision.downstream.shapes import write_shapes
from megatron_ext.vision.network import Network
from megatron_ext.vision.segmentation.upernet import FAMILY
from megatron_ext.vision.weights import to_published

PROGRAM = "tests/support/segment_program.py"
MODEL = MambaVision(
    pattern="C/C/MS/M", dim=16, stem=16, head_dim=16, window=4, last_window=2, state=4, resolution=64, classes=1000
)
FLAGS = [
    "--preset", "mambavision-nano", "--mambavision-pattern", "C/C/MS/M", "--mambavision-classes", "4",
    "--mambavision-resolution", "64", "--upernet-channels", "32", "--upernet-auxiliary", "8",
    "--segment-data", "shapes", "--micro-batch-size", "4", "--global-batch-size", "4", "--clip-grad", "1.0",
    "--lr", "1e-2", "--eval-iters", "2", "--eval-interval", "100",
]  # fmt: skip
EASY = [
    "--segment-smallest", "0.75", "--segment-largest", "1.5", "--no-segment-colour", "--lr-warmup-iters", "10",
    "--micro-batch-size", "8", "--global-batch-size", "8", "--train-iters", "60",
]  # fmt: skip


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Shapes, of which one has no annotation and one a wrong one, and a run of 60 steps that is saved at 57."""
    path = tmp_path_factory.mktemp("segment")
    write_shapes(path / "shapes", images=24, plain=True)
    (path / "shapes/annotations/training/00003.png").unlink()
    Image.new("L", (5, 5)).save(path / "shapes/annotations/training/00008.png")
    torch.manual_seed(1)
    torch.save(to_published(Network(MODEL).state_dict(), MODEL), path / "published.pth")
    workspace = Workspace(path, [])
    whole = ["--save-interval", "57", "--save", "whole", "--load", "whole"]
    done = workspace.run(PROGRAM, *FLAGS, *EASY, *whole, "--segment-backbone", "published.pth")
    assert "1 images for training have no annotation and are left out" in done.stderr
    assert done.stderr.count("the annotation is 5 x 5 pixels, the image 64 x 64") == 1
    return workspace


def weights(wing: Workspace, run: str, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run / f"iter_{step:07d}")
    return {name: reader.read(name) for name in reader.shapes if name.startswith("network.")}


def test_it_learns(wing: Workspace) -> None:
    """A quarter of .9 is what saying "ground" everywhere is worth."""
    last = wing.metrics("whole")[-1]
    assert last["val_miou"] > 0.35
    assert last["val_pixel_accuracy"] > 0.9
    assert last["loss"] < wing.metrics("whole")[0]["loss"] / 3
    assert sum(step["skipped"] for step in wing.metrics("whole")) * 8 == pytest.approx(480 / 23, abs=1.5)


def test_it_goes_on_bit_for_bit(wing: Workspace) -> None:
    """From step 57 as from there in one run: crops, left-out channels and batch norm's statistics."""
    flags = ["--load", "whole", "--ckpt-step", "57", "--save", "twice"]
    wing.run(PROGRAM, *FLAGS, *EASY, *flags)
    whole, twice = weights(wing, "whole", 60), weights(wing, "twice", 60)
    assert whole.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    assert wing.metrics("twice")[-1]["val_miou"] == wing.metrics("whole")[-1]["val_miou"]


def test_every_image_is_measured_once_at_its_own_size(wing: Workspace) -> None:
    """By two ranks, six images in batches of four, against sets of pixels of the plain network's predictions."""
    image = Image.open(wing.path / "shapes/images/validation/00001.png").resize((80, 100))
    image.save(wing.path / "shapes/images/validation/00001.png")
    labels = Image.open(wing.path / "shapes/annotations/validation/00001.png").resize(
        (80, 100), Image.Resampling.NEAREST
    )
    labels.save(wing.path / "shapes/annotations/validation/00001.png")
    flags = ["--skip-train", "--micro-batch-size", "2", "--pretrained-checkpoint", "whole", "--save", "measured"]
    wing.run(PROGRAM, *FLAGS, *flags, ranks=2)
    found = json.loads((wing.path / "measured/results.json").read_text())["validation"]
    network = FAMILY.read_network(wing.path / "whole")
    pairs, total, count = np.zeros((4, 4)), 0.0, 0
    for index in range(6):
        image = Image.open(wing.path / f"shapes/images/validation/{index:05d}.png")
        labels = np.array(Image.open(wing.path / f"shapes/annotations/validation/{index:05d}.png")).astype(int) - 1
        size = (64, 80) if index == 1 else (64, 64)
        pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1)
        with torch.no_grad():
            logits = F.interpolate(network(normalised(pixels[None]))[0], labels.shape, mode="bilinear")
        total += F.cross_entropy(logits, torch.from_numpy(labels)[None], reduction="sum").item()
        count += labels.size
        np.add.at(pairs, (labels, logits[0].argmax(0).numpy()), 1)
    unions = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    assert found["miou"] == pytest.approx((pairs.diagonal() / unions).mean(), rel=1e-4)
    assert found["pixel_accuracy"] == pytest.approx(pairs.trace() / count, rel=1e-4)
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)
    assert Image.open(wing.path / "measured/predictions.png").width == 3 * 128 + 8


# With an Adam that divides by no less than .01: the gradient of a bias before a norm is rounding alone.
SMOOTH = [
    *FLAGS, "--train-iters", "2", "--upernet-dropout", "0", "--pretrained-checkpoint", "whole", "--adam-eps", "0.01"
]  # fmt: skip


def test_no_layout_changes_its_result(wing: Workspace) -> None:
    """Two tensor-parallel ranks, two data-parallel ones with the distributed optimizer, and bf16."""
    wing.run(PROGRAM, *SMOOTH, "--save", "alone")
    wing.run(PROGRAM, *SMOOTH, "--tensor-model-parallel-size", "2", "--save", "tp", ranks=2)
    wing.run(PROGRAM, *SMOOTH, "--micro-batch-size", "2", "--use-distributed-optimizer", "--save", "dp", ranks=2)
    expected = weights(wing, "alone", 2)
    for run in ("tp", "dp"):
        for key in ("loss", "auxiliary_loss", "val_loss", "val_miou", "grad_norm"):
            found = [step[key] for step in wing.metrics(run) if key in step]
            right = [step[key] for step in wing.metrics("alone") if key in step]
            assert found == pytest.approx(right, rel=1e-4), (run, key)
        for name, value in weights(wing, run, 2).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    wing.run(PROGRAM, *SMOOTH, "--bf16", "--save", "bf16")
    found = [step["loss"] for step in wing.metrics("bf16")]
    assert found == pytest.approx([step["loss"] for step in wing.metrics("alone")], rel=3e-2)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--segment-data", "nowhere"], "no such folder of images or annotations"),
        (["--mambavision-classes", "2"], "a class that is none"),
        (["--micro-batch-size", "1", "--global-batch-size", "1"], "no norm can be of"),
        (
            ["--segment-backbone", "published.pth", "--mambavision-dim", "32"],
            "tensors of the checkpoint have other shapes",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(wing: Workspace, flags: list[str], what: str) -> None:
    done = wing.run(PROGRAM, *FLAGS, "--train-iters", "1", "--dry-run", *flags, ok=False)
    assert what in done.stderr


def test_a_dry_run_shows_network_and_images(wing: Workspace) -> None:
    said = wing.run(PROGRAM, *FLAGS, "--train-iters", "4", "--dry-run").stdout
    assert "23 for training, 6 for validation" in said
    assert "1 without annotation" in said
