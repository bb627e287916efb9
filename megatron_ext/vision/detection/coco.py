"""Images with boxes and outlines of objects, in the format of COCO: a folder of images, and a JSON file.

What the file says is looked at when it is read; images are read one by one.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from megatron_ext.errors import DataError
from megatron_ext.vision.downstream.samples import BrokenError
from megatron_ext.vision.images import MODES

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
LEGAL = "COCO's format: images, annotations, categories"


class Annotated(NamedTuple):
    """An image and the objects on it.

    Attributes:
        image: The image.
        boxes: (n, 4) float32: left, top, right, bottom.
        labels: (n,) int64, from 1.
        masks: (n, h, w) uint8, 0 and 1; None where they are not asked for.
    """

    image: Image.Image
    boxes: "np.ndarray[Any, Any]"
    labels: "np.ndarray[Any, Any]"
    masks: "np.ndarray[Any, Any] | None"


class CocoImages:
    """The images of a COCO file.

    Args:
        root: The folder of the images.
        file: The JSON file.
        channels: Of the images, 1 or 3.
        masks: Whether outlines are needed.
        annotated: Only images with an object, as training needs them.

    Attributes:
        images: What the file says of each.
        categories: Identifiers of the classes, in rising order: class 1 is the first.
        objects: The annotations that can be used, by image; those of crowds, too.
        left_out: What cannot be used, in words.

    Raises:
        DataError: It is no such file, names a category that it does not have, or has nothing that can be used.
    """

    def __init__(self, root: Path, file: Path, channels: int = 3, masks: bool = True, annotated: bool = False) -> None:
        self.root, self.file, self._mode, self._masks = root, file, MODES[channels], masks
        if not root.is_dir():
            raise DataError("no such folder of images", got=root)
        said = _read(file)
        self.categories = sorted(int(category["id"]) for category in said["categories"])
        self.names = {int(c["id"]): str(c.get("name", c["id"])) for c in said["categories"]}
        self.images = list(said["images"])
        known = {image["id"]: image for image in self.images}
        self.objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        self.left_out: list[str] = []
        for annotation in said["annotations"]:
            if annotation.get("category_id") not in self.names:
                got = f"{file}: annotation {annotation.get('id')}: {annotation.get('category_id')}"
                legal = ", ".join(map(str, self.categories[:20]))
                raise DataError("an annotation has a category that is none", got=got, legal=legal)
            problem = _problem(annotation, known.get(annotation.get("image_id")), masks)
            if problem is None:
                self.objects[annotation["image_id"]].append(annotation)
            else:
                self.left_out.append(f"annotation {annotation.get('id')}: {problem}")
        if said["annotations"] and len(self.left_out) == len(said["annotations"]):
            legal = "bbox [left, top, width, height] within the image" + ", segmentation; --no-rcnn-masks" * masks
            raise DataError("no annotation can be used", got=f"{file}: {self.left_out[0]}", legal=legal)
        if annotated:
            without = [image for image in self.images if not self._own(image)]
            self.left_out += [f"image {image['file_name']}: no object on it" for image in without]
            self.images = [image for image in self.images if self._own(image)]
        if not self.images:
            raise DataError("no images with objects" if annotated else "no images", got=file, legal=LEGAL)
        self.most = max(len(self._own(image)) for image in self.images)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.images[index]["file_name"])

    def sizes(self, index: int) -> tuple[int, int]:
        """Width and height, as the file says."""
        return self.images[index]["width"], self.images[index]["height"]

    def _own(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The objects on an image, without crowds."""
        return [own for own in self.objects[image["id"]] if not own.get("iscrowd")]

    def read(self, index: int) -> Annotated:
        """An image and its objects, without crowds.

        Raises:
            BrokenError: The image cannot be read, or is of another size than the file says.
        """
        image = self.images[index]
        width, height = self.sizes(index)
        try:
            with Image.open(self.root / image["file_name"]) as picture:
                pixels = picture.convert(self._mode)
        except UNREADABLE as error:
            raise BrokenError(str(error)) from error
        if pixels.size != (width, height):
            raise BrokenError(f"the image is {pixels.width} x {pixels.height}, and annotated as {width} x {height}")
        own = self._own(image)
        left_top_size = np.array([each["bbox"] for each in own], dtype=np.float32).reshape(-1, 4)
        boxes = np.concatenate([left_top_size[:, :2], left_top_size[:, :2] + left_top_size[:, 2:]], 1)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, dtype=np.float32))
        labels = np.array([self.categories.index(each["category_id"]) + 1 for each in own], dtype=np.int64)
        masks = None
        if self._masks:
            masks = np.zeros((len(own), height, width), dtype=np.uint8)
            for place, each in zip(masks, own, strict=True):
                place[:] = outlined(each["segmentation"], height, width)
        return Annotated(pixels, boxes, labels, masks)


def outlined(segmentation: Any, height: int, width: int) -> "np.ndarray[Any, Any]":
    """The pixels (height, width) of polygons, or of run lengths, as COCO writes either."""
    from faster_coco_eval.core import mask

    codes: Any
    if isinstance(segmentation, list):
        polygons: Any = mask.frPyObjects(segmentation, height, width)
        codes = mask.merge(polygons)
    elif isinstance(segmentation["counts"], list):
        codes = mask.frPyObjects(segmentation, height, width)
    else:
        codes = segmentation
    return mask.decode(codes)


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("annotations cannot be read", got=f"{file}: {error}", legal=LEGAL) from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(said, dict) or not isinstance(said.get(name), list):
            raise DataError(f"the file has no list of {name}", got=file, legal=LEGAL)
    for image in said["images"]:
        if not {"id", "file_name", "width", "height"} <= image.keys():
            raise DataError("an image lacks id, file_name, width or height", got=f"{file}: {image}", legal=LEGAL)
    return said


def _problem(annotation: dict[str, Any], image: dict[str, Any] | None, masks: bool) -> str | None:
    """Why an annotation cannot be used; None if it can."""
    if image is None:
        return f"no image {annotation.get('image_id')}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not np.isfinite(np.array(box, dtype=float)).all():
        return f"the box is {box}"
    left, top, width, height = box
    inside = min(left + width, image["width"]) - max(left, 0), min(top + height, image["height"]) - max(top, 0)
    if width <= 0 or height <= 0 or min(inside) <= 0:
        return f"the box {box} is empty on an image of {image['width']} x {image['height']}"
    outline = annotation.get("segmentation")
    if not masks:
        return None
    if isinstance(outline, dict):
        return None if outline.get("size") == [image["height"], image["width"]] else "run lengths of another size"
    if not isinstance(outline, list) or not outline or any(len(each) < 6 or len(each) % 2 for each in outline):
        return "no outline"
    return None
