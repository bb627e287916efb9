"""Images with a class for each pixel, in two folders of one form, as ADE20K is laid out.

    images/SPLIT/NAME.jpg         the image
    annotations/SPLIT/NAME.png    one channel: 0 for pixels without a class, 1 for the first class

Annotations become class 0 for the first, and `IGNORED` where there is none; 255 in a file is none, too.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from megatron_ext.errors import DataError
from megatron_ext.vision.downstream.samples import BrokenError
from megatron_ext.vision.images import MODES
from megatron_ext.vision.sources import ENDINGS

IGNORED = 255
LOOKED_AT = 16  # annotations of a split that are read before anything starts
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ClassError(BrokenError):
    """An annotation names a class that is none, which others of the set will, too."""


class Annotated(NamedTuple):
    """An image and the classes of its pixels (h, w), uint8."""

    image: Image.Image
    labels: np.ndarray[Any, Any]


class SegmentationFolder:
    """The images of a split that have an annotation, in order of their names.

    Args:
        root: The folder.
        split: Its part.
        classes: How many there are.
        channels: Of the images, 1 or 3.

    Attributes:
        without: Names of the images that have none, and are left out.

    Raises:
        DataError: There is no such folder, or no image with an annotation.
    """

    def __init__(self, root: Path, split: str, classes: int, channels: int = 3) -> None:
        self.root, self._classes, self._mode = root / "images" / split, classes, MODES[channels]
        annotations = root / "annotations" / split
        for folder in (self.root, annotations):
            if not folder.is_dir():
                legal = "images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png"
                raise DataError("no such folder of images or annotations", got=folder, legal=legal)
        images = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in ENDINGS)
        pairs = [(path, (annotations / path.relative_to(self.root)).with_suffix(".png")) for path in images]
        known = set(annotations.rglob("*.png"))
        self._pairs = [(image, labels) for image, labels in pairs if labels in known]
        self.without = [str(image) for image, labels in pairs if labels not in known]
        if not self._pairs:
            got = f"{len(images)} images in {self.root}, {len(known)} annotations in {annotations}"
            raise DataError(
                "no image has an annotation of its name", got=got, legal="images/SPLIT/a.jpg, annotations/SPLIT/a.png"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self._pairs[index][0])

    def sizes(self, index: int) -> tuple[int, int]:
        """Width and height, of the file's first bytes.

        Raises:
            BrokenError: It is no image.
        """
        try:
            with Image.open(self._pairs[index][0]) as picture:
                return picture.size
        except UNREADABLE as error:
            raise BrokenError(str(error)) from error

    def read(self, index: int) -> Annotated:
        """An image and its classes.

        Raises:
            BrokenError: One cannot be read, or the annotation does not fit the image or names a class that is none.
        """
        image, labels = self._pairs[index]
        try:
            with Image.open(image) as picture:
                pixels = picture.convert(self._mode)
            with Image.open(labels) as picture:
                numbers = np.array(picture)
        except UNREADABLE as error:
            raise BrokenError(str(error)) from error
        if numbers.ndim != 2:
            raise BrokenError(f"the annotation has {numbers.shape[-1]} channels, not one of class numbers")
        if numbers.shape != (pixels.height, pixels.width):
            own = f"{numbers.shape[1]} x {numbers.shape[0]}"
            raise BrokenError(f"the annotation is {own} pixels, the image {pixels.width} x {pixels.height}")
        numbers = numbers.astype(np.int64)
        wrong = (numbers > self._classes) & (numbers != IGNORED) | (numbers < 0)
        if wrong.any():
            raise ClassError(f"the annotation has class {numbers[wrong][0]}, of {self._classes}")
        return Annotated(pixels, np.where((numbers == 0) | (numbers == IGNORED), IGNORED, numbers - 1).astype(np.uint8))

    def look(self) -> None:
        """Read some of them, spread over all.

        Raises:
            DataError: One has a class that is none, or none can be used; says why.
        """
        chosen = sorted({round(i * (len(self) - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})
        errors = []
        for index in chosen:
            try:
                self.read(index)
            except BrokenError as error:
                errors.append(f"{self.name(index)}: {error}")
                if isinstance(error, ClassError):
                    legal = f"0 to {self._classes}, or --mambavision-classes N"
                    raise DataError("an annotation has a class that is none", got=errors[-1], legal=legal) from error
        if len(errors) == len(chosen):
            what = f"none of {len(chosen)} images that were looked at can be used"
            raise DataError(what, got=errors[0], legal=f"one channel as large as the image, 0 to {self._classes}")
