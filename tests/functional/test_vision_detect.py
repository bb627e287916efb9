"""`megatron-ext vision-detect` from COCO's files to a measured checkpoint: it learns, resumes, and layouts agree."""

import json
import math
from typing import Any

import pytest
import torch
from PIL import Image
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.detection.precision import Detections
from megatron_ext.vision.detection.rcnn import FAMILY, detect
from megatron_ext.vision.detection.variations import Whole, whole_images
from megatron_ext.vision.downstream.colours import normalised
from megatron_ext.vision.downstream.shapes import write_shapes

PROGRAM = "tests/support/detect_program.py"
FLAGS = [
    "--preset", "mambavision-nano", "--mambavision-pattern", "C/C/MS/M", "--mambavision-classes", "3",
    "--mambavision-resolution", "64", "--rcnn-channels", "32", "--rcnn-hidden", "64", "--rcnn-anchor", "8",
    "--rcnn-proposals", "30", "--rcnn-sampled", "32", "--detect-train", "shapes/images/training",
    "--detect-train-file", "shapes/training.json", "--detect-valid", "shapes/images/validation",
    "--detect-valid-file", "shapes/validation.json", "--detect-smallest", "0.75", "--detect-largest", "1.25",
    "--micro-batch-size", "4", "--global-batch-size", "4", "--lr", "3e-3", "--eval-iters", "2",
    "--eval-interval", "100",
]  # fmt: skip

LARGE = [
    "--micro-batch-size", "8", "--global-batch-size", "8", "--lr-warmup-iters", "10", "--lr-decay-style", "constant",
    "--train-iters", "50",
]  # fmt: skip


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Shapes, one image broken and the one object of another off its image, and a run of 50 steps, saved at 47."""
    path = tmp_path_factory.mktemp("detect")
    write_shapes(path / "shapes", images=24, plain=True)
    (path / "shapes/images/training/00003.png").write_bytes(b"no picture")
    file = path / "shapes/training.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["bbox"][0] = 500
    file.write_text(json.dumps(coco))
    workspace = Workspace(path, [])
    whole = [*LARGE, "--save-interval", "47", "--save", "whole", "--load", "whole"]
    done = workspace.run(PROGRAM, *FLAGS, *whole)
    assert "2 are left out of train, such as annotation 1: the box [500" in done.stderr
    assert done.stderr.count("left out: shapes/images/training/00003.png") == 1
    return workspace


def weights(wing: Workspace, run: str, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run / f"iter_{step:07d}")
    return {name: reader.read(name) for name in reader.shapes if name.startswith("network.")}


def test_it_learns(wing: Workspace) -> None:
    last = wing.metrics("whole")[-1]
    assert last["val_box_ap_50"] > 0.5
    assert last["val_mask_ap_50"] > 0.5
    assert last["val_box_ap"] > 0.2
    assert sum(step["skipped"] for step in wing.metrics("whole")) * 8 == pytest.approx(400 / 23, abs=1.5)


def test_it_goes_on_bit_for_bit(wing: Workspace) -> None:
    """From step 47 as from there in one run: squares, sampled proposals and batch norm's statistics."""
    flags = [*LARGE, "--load", "whole", "--ckpt-step", "47", "--save", "twice"]
    wing.run(PROGRAM, *FLAGS, *flags)
    whole, twice = weights(wing, "whole", 50), weights(wing, "twice", 50)
    assert whole.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    assert wing.metrics("twice")[-1]["val_box_ap"] == wing.metrics("whole")[-1]["val_box_ap"]


def test_every_image_is_measured_once(wing: Workspace) -> None:
    """By two ranks, six images in batches of four, one of another size, as by the plain network one by one."""
    image = wing.path / "shapes/images/validation/00001.png"
    Image.open(image).resize((96, 48)).save(image)
    file = wing.path / "shapes/validation.json"
    coco = json.loads(file.read_text())
    coco["images"][1] |= {"width": 96, "height": 48}
    for annotation in coco["annotations"]:
        if annotation["image_id"] == 2:
            annotation["bbox"] = [v * (1.5 if i % 2 == 0 else 0.75) for i, v in enumerate(annotation["bbox"])]
            (outline,) = annotation["segmentation"]
            annotation["segmentation"] = [[v * (1.5 if i % 2 == 0 else 0.75) for i, v in enumerate(outline)]]
    file.write_text(json.dumps(coco))
    flags = ["--skip-train", "--micro-batch-size", "2", "--pretrained-checkpoint", "whole", "--save", "measured"]
    wing.run(PROGRAM, *FLAGS, *flags, ranks=2)
    found = json.loads((wing.path / "measured/results.json").read_text())["validation"]
    network: Any = FAMILY.read_network(wing.path / "whole")
    source = CocoImages(wing.path / "shapes/images/validation", file)
    whole, detections = Whole(source, 64, 3), Detections(source)
    for index in range(6):
        sample = {name: value[None] for name, value in whole(source.read(index)).items()}
        ((_, pixels, size),) = whole_images(sample | {"image": torch.tensor([index])}, 3)
        with torch.no_grad():
            detections.add(index, detect(network, normalised(pixels), size))
    for name, value in detections.scores(("box", "mask")).items():
        if not math.isnan(value):
            assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["box_ap_50"] > 0.5
    assert Image.open(wing.path / "measured/detections.png").width >= 2 * 256


# Squares so small that all anchors and proposals are taken, and none by chance.
SMOOTH = [
    *FLAGS, "--train-iters", "2", "--pretrained-checkpoint", "whole", "--adam-eps", "0.01", "--eval-iters", "0",
    "--mambavision-resolution", "32", "--rcnn-anchor", "4", "--rcnn-sampled", "512", "--lr", "1e-3",
]  # fmt: skip


def test_layouts_and_precisions(wing: Workspace) -> None:
    """Two tensor-parallel ranks give the same; two data-parallel ones nearly, whose losses are means of each rank's."""
    wing.run(PROGRAM, *SMOOTH, "--save", "alone")
    wing.run(PROGRAM, *SMOOTH, "--tensor-model-parallel-size", "2", "--save", "tp", ranks=2)
    dp = ["--micro-batch-size", "2", "--use-distributed-optimizer", "--bf16"]
    wing.run(PROGRAM, *SMOOTH, *dp, "--save", "dp", ranks=2)
    expected = weights(wing, "alone", 2)
    right = wing.metrics("alone")
    for key in ("loss", "proposal_loss", "class_loss", "box_loss", "mask_loss", "grad_norm"):
        found = [step[key] for step in wing.metrics("tp")]
        assert found == pytest.approx([step[key] for step in right], rel=1e-3), key
    for name, value in weights(wing, "tp", 2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    found = [step["loss"] for step in wing.metrics("dp")]
    assert found == pytest.approx([step["loss"] for step in right], rel=0.25)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--detect-valid-file", "nowhere.json"], "annotations cannot be read"),
        (["--mambavision-classes", "2"], "more categories than the heads know"),
        (["--mambavision-resolution", "70"], "no whole strides"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(wing: Workspace, flags: list[str], what: str) -> None:
    done = wing.run(PROGRAM, *FLAGS, "--train-iters", "1", "--dry-run", *flags, ok=False)
    assert what in done.stderr
