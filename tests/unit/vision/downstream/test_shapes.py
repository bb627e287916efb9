"""The procedural set says the truth: class maps, boxes, outlines and areas are of the same shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.vision.downstream.shapes import CLASSES, write_shapes


def test_maps_and_boxes_are_of_the_same_shapes(tmp_path: Path) -> None:
    write_shapes(tmp_path, images=8, side=48, plain=True)
    for split, count in (("training", 8), ("validation", 2)):
        coco = json.loads((tmp_path / f"{split}.json").read_text())
        assert len(coco["images"]) == count
        for image in coco["images"]:
            labels = np.array(Image.open(tmp_path / "annotations" / split / image["file_name"]))
            pixels = np.array(Image.open(tmp_path / "images" / split / image["file_name"]))
            assert pixels.shape == (48, 48, 3)
            own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            assert {a["category_id"] + 1 for a in own} | {1} == set(np.unique(labels))
            rest = labels.copy()
            for annotation in own:
                x, y, width, height = annotation["bbox"]
                inside = np.zeros_like(labels, dtype=bool)
                inside[int(y) : int(y + height) + 2, int(x) : int(x + width) + 2] = True
                shape = inside & (labels == annotation["category_id"] + 1)
                assert shape.sum() == pytest.approx(annotation["area"], rel=0.1)
                assert (pixels[shape].argmax(1) == annotation["category_id"] - 1).all(), "each class has its colour"
                rest[shape] = 1
            assert (rest == 1).all(), "nothing lies outside of the boxes"
    assert {c["name"] for c in coco["categories"]} == set(CLASSES[1:])


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shapes(tmp_path / name, images=2, side=32, seed=seed)
    files = [sorted((tmp_path / name).rglob("*.*")) for name in "abc"]
    one, same, other = ([path.read_bytes() for path in each] for each in files)
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))
