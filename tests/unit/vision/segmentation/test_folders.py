"""ADE-style folders: classes as they are in the files, and everything that does not fit, in words."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.errors import DataError
from megatron_ext.vision.downstream.samples import BrokenError
from megatron_ext.vision.segmentation.folders import IGNORED, SegmentationFolder


def write(root: Path, name: str, labels: object, size: tuple[int, int] = (4, 3)) -> None:
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(root / "images" / "training" / f"{name}.jpg")
    if labels is not None:
        Image.fromarray(np.array(labels)).save(root / "annotations" / "training" / f"{name}.png")


GOOD = np.array([[0, 1, 2, 3], [3, 3, 3, 3], [255, 1, 1, 1]], dtype=np.uint8)


def test_classes_begin_at_one_in_files_and_at_zero_here(tmp_path: Path) -> None:
    write(tmp_path, "a", GOOD)
    write(tmp_path, "b", None)
    source = SegmentationFolder(tmp_path, "training", 3)
    assert len(source) == 1
    assert [Path(name).name for name in source.without] == ["b.jpg"]
    image, labels = source.read(0)
    assert labels.tolist() == [[IGNORED, 0, 1, 2], [2] * 4, [IGNORED, 0, 0, 0]]
    assert image.size == source.sizes(0) == (4, 3)
    source.look()


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (GOOD[:2], "the annotation is 4 x 2 pixels, the image 4 x 3"),
        (np.where(GOOD == 3, 4, GOOD), "the annotation has class 4, of 3"),
        (np.stack([GOOD] * 3, -1), "the annotation has 3 channels"),
        (GOOD.astype(np.uint16) + 300, "has class 300"),
    ],
    ids=["size", "class", "channels", "16 bits"],
)
def test_what_does_not_fit_is_told(tmp_path: Path, labels: object, what: str) -> None:
    """One by one when it is read; before anything starts if nothing fits."""
    write(tmp_path, "a", labels)
    source = SegmentationFolder(tmp_path, "training", 3)
    with pytest.raises(BrokenError, match=what):
        source.read(0)
    with pytest.raises(DataError, match=what):
        source.look()
    write(tmp_path, "b", GOOD)
    if "class" in what:
        with pytest.raises(DataError, match="a class that is none"):
            SegmentationFolder(tmp_path, "training", 3).look()
    else:
        SegmentationFolder(tmp_path, "training", 3).look()


def test_what_is_not_there_or_no_image_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of images or annotations"):
        SegmentationFolder(tmp_path, "training", 3)
    write(tmp_path, "a", None)
    with pytest.raises(DataError, match="no image has an annotation of its name"):
        SegmentationFolder(tmp_path, "training", 3)
    write(tmp_path, "a", GOOD)
    for kind, name in (("images", "a.jpg"), ("annotations", "a.png")):
        (tmp_path / kind / "training" / name).write_bytes(b"no picture")
        with pytest.raises(BrokenError):
            SegmentationFolder(tmp_path, "training", 3).read(0)
        write(tmp_path, "a", GOOD)
