"""COCO's format: boxes, classes and masks as the file says them, and all that does not fit, in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ext.errors import DataError
from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.downstream.samples import BrokenError

SQUARE = [2, 1, 5, 1, 5, 5, 2, 5]  # 3 wide, 4 high


def said(**changes: Any) -> dict[str, Any]:
    """Three images of 8 x 6; two objects and a crowd on the first, none on the second."""
    runs = {"size": [6, 8], "counts": [0, 6, 42]}  # the first column
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in (7, 8, 9)],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 30, "bbox": [2, 1, 3, 4], "segmentation": [SQUARE], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 10, "bbox": [0, 0, 1, 6], "segmentation": runs, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 10, "bbox": [0, 0, 8, 6], "segmentation": runs, "iscrowd": 1},
            {"id": 4, "image_id": 9, "category_id": 30, "bbox": [6, 4, 9, 9], "segmentation": [SQUARE], "iscrowd": 0},
        ],
        "categories": [{"id": 30, "name": "cup"}, {"id": 10, "name": "cat"}],
    } | changes  # fmt: skip


def write(root: Path, what: Any) -> tuple[Path, Path]:
    (root / "images").mkdir(exist_ok=True)
    for number in (7, 8, 9):
        Image.new("RGB", (8, 6)).save(root / "images" / f"{number}.png")
    (root / "some.json").write_text(json.dumps(what))
    return root / "images", root / "some.json"


def test_what_the_file_says(tmp_path: Path) -> None:
    source = CocoImages(*write(tmp_path, said()))
    assert len(source) == 3
    assert (source.categories, source.most, source.left_out) == ([10, 30], 2, [])
    found = source.read(0)
    assert found.boxes.tolist() == [[2, 1, 5, 5], [0, 0, 1, 6]]
    assert found.labels.tolist() == [2, 1]
    assert found.masks is not None
    square = np.zeros((6, 8))
    square[1:5, 2:5] = 1
    column = np.zeros((6, 8))
    column[:, 0] = 1
    assert np.array_equal(found.masks, [square, column])
    assert len(source.read(1).boxes) == 0
    assert source.read(2).boxes.tolist() == [[6, 4, 8, 6]], "cut off at the image's border"


def test_training_needs_images_with_objects(tmp_path: Path) -> None:
    source = CocoImages(*write(tmp_path, said()), annotated=True)
    assert [image["id"] for image in source.images] == [7, 9]
    assert source.left_out == ["image 8.png: no object on it"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bbox": [9, 1, 2, 2]}, "is empty on an image of 8 x 6"), ({"bbox": [1, 1, 0, 2]}, "is empty on an image"),
        ({"bbox": [1, 1]}, "the box is"), ({"image_id": 5}, "no image 5"), ({"segmentation": []}, "no outline"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "run lengths of another size"),
    ],
)  # fmt: skip
def test_an_annotation_that_does_not_fit_is_left_out_and_told(tmp_path: Path, change: dict, what: str) -> None:
    """Where none fits, that is an error; boxes alone need no outline."""
    whole = said()
    whole["annotations"][0] |= change
    source = CocoImages(*write(tmp_path, whole))
    assert len(source.left_out) == 1
    assert what in source.left_out[0]
    whole["annotations"] = whole["annotations"][:1]
    with pytest.raises(DataError, match="no annotation can be used"):
        CocoImages(*write(tmp_path, whole))
    if "segmentation" in change:
        assert CocoImages(*write(tmp_path, whole), masks=False).left_out == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([], "no list of images"), (said(categories=None), "no list of categories"),
        (said(categories=[{"id": 10}]), "a category that is none"), (said(images=[{"id": 3}]), "an image lacks"),
        (said(images=[], annotations=[]), "no images"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_none_is_told(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CocoImages(*write(tmp_path, what))


def test_images_that_are_not_there_or_other_ones(tmp_path: Path) -> None:
    root, file = write(tmp_path, said())
    source = CocoImages(root, file)
    Image.new("RGB", (5, 5)).save(root / "7.png")
    (root / "8.png").write_bytes(b"nothing")
    (root / "9.png").unlink()
    for index, what in enumerate(("annotated as 8 x 6", "cannot identify", "No such file")):
        with pytest.raises(BrokenError, match=what):
            source.read(index)
    file.write_text("{")
    with pytest.raises(DataError, match="annotations cannot be read"):
        CocoImages(root, file)
    with pytest.raises(DataError, match="no such folder"):
        CocoImages(tmp_path / "nowhere", file)
