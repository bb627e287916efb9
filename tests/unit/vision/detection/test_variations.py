"""Boxes, masks and images are varied alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.vision.detection.coco import Annotated, CocoImages
from megatron_ext.vision.detection.options import DetectOptions
from megatron_ext.vision.detection.variations import Squares, Whole, targets, whole_images
from megatron_ext.vision.downstream.shapes import write_shapes
from megatron_ext.vision.images import seeded


def annotated() -> Annotated:
    """Two rectangles that are as bright as their number says, on black."""
    pixels, masks = np.zeros((48, 64, 3), dtype=np.uint8), np.zeros((2, 48, 64), dtype=np.uint8)
    boxes = np.array([[8, 4, 24, 20], [32, 24, 60, 40]], dtype=np.float32)
    for index, (left, top, right, bottom) in enumerate(boxes.astype(int)):
        masks[index, top:bottom, left:right] = 1
        pixels[top:bottom, left:right] = 100 * (index + 1)
    return Annotated(Image.fromarray(pixels), boxes, np.array([1, 2]), masks)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_masks_lie_where_the_image_shows(scale: float, flip: float) -> None:
    squares = Squares(DetectOptions(smallest=scale, largest=scale, flip=flip), 64, 3, most=5)
    seen = 0
    for index in range(8):
        with seeded(0, index):
            sample = squares(annotated())
        assert sample["boxes"].shape == (5, 4)
        (own,) = targets({name: value[None] for name, value in sample.items()})
        assert own["masks"].shape == (len(own["labels"]), 64, 64)
        for label, box, mask in zip(own["labels"], own["boxes"], own["masks"], strict=True):
            seen += 1
            rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == pytest.approx([float(each) for each in around], abs=1.0)
            bright = sample["pixels"][0][mask > 0].float()
            assert bright.median() == 100 * label
    assert seen >= 8


def test_whole_images_travel_flat(tmp_path: Path) -> None:
    write_shapes(tmp_path, images=1, side=48)
    source = CocoImages(tmp_path / "images/training", tmp_path / "training.json")
    whole = Whole(source, 96, 3)
    sample = whole(source.read(0))
    assert sample["size"].tolist() == [96, 96, 48, 48]
    batch = {name: torch.stack([value, value]) for name, value in sample.items()} | {"image": torch.tensor([-1, 0])}
    ((number, pixels, size),) = whole_images(batch, 3)
    assert (number, pixels.shape, size) == (0, (1, 3, 96, 96), (48, 48))
    expected = np.array(source.read(0).image.resize((96, 96), Image.Resampling.BILINEAR))
    assert torch.equal(pixels[0], torch.from_numpy(expected).permute(2, 0, 1))
