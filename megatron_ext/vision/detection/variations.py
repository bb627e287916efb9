"""How images with objects become tensors: scaled, cropped, mirrored squares for training; whole images for validation.

Objects of an image are rows of tensors that have as many as any image of the set; rows without an object have label 0.
Masks are bits, eight pixels of a row in a byte.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.vision.detection.coco import Annotated, CocoImages
from megatron_ext.vision.detection.options import DetectOptions

SMALLEST = 1.0  # pixels that a side of a box must have


class Squares:
    """Squares of images for training, black where there is no image.

    Args:
        options: The flags.
        side: Of the square.
        channels: Of the images.
        most: Objects on an image.
    """

    def __init__(self, options: DetectOptions, side: int, channels: int, most: int) -> None:
        self._options, self._side, self._channels, self._most = options, side, channels, most

    def __call__(self, annotated: Annotated) -> dict[str, Tensor]:
        """A sample, by NumPy's random numbers: `pixels`, `boxes`, `labels`, and with masks `masks`."""
        options, side = self._options, self._side
        picture, boxes, labels, masks = annotated
        factor = float(np.random.uniform(options.smallest, options.largest)) * side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        left, top = (int(np.random.randint(0, max(1, length - side + 1))) for length in size)
        shown = (left, top, min(left + side, size[0]), min(top + side, size[1]))
        width, height = shown[2] - left, shown[3] - top
        mirrored = np.random.rand() < options.flip
        scale = np.array([size[0] / picture.width, size[1] / picture.height] * 2, dtype=np.float32)
        boxes = np.clip(boxes * scale - np.array([left, top] * 2), 0, np.array([width, height] * 2)).astype(np.float32)
        picture = picture.resize(size, Image.Resampling.BILINEAR).crop(shown)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        pixels = np.zeros((side, side, self._channels), dtype=np.uint8)
        pixels[:height, :width] = np.array(picture).reshape(height, width, self._channels)
        keep = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1))
        found: dict[str, Any] = {"pixels": torch.from_numpy(pixels).permute(2, 0, 1).contiguous()}
        found["boxes"], found["labels"] = torch.zeros(self._most, 4), torch.zeros(self._most, dtype=torch.int64)
        found["boxes"][: len(keep)] = torch.from_numpy(boxes[keep])
        found["labels"][: len(keep)] = torch.from_numpy(labels[keep])
        if masks is not None:
            bits = np.zeros((self._most, side, side), dtype=bool)
            for place, index in zip(bits, keep, strict=False):
                own = np.array(Image.fromarray(masks[index]).resize(size, Image.Resampling.NEAREST).crop(shown))
                place[:height, :width] = own[:, ::-1] if mirrored else own
            found["masks"] = torch.from_numpy(np.packbits(bits, -1))
        return found


def targets(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The objects of each square of a batch, as torchvision wants them."""
    found = []
    for index, labels in enumerate(batch["labels"]):
        there = labels > 0
        own = {"boxes": batch["boxes"][index][there], "labels": labels[there]}
        if "masks" in batch:
            bits = batch["masks"][index][there][..., None] >> torch.arange(7, -1, -1, device=labels.device)
            own["masks"] = (bits & 1).flatten(2).to(torch.uint8)
        found.append(own)
    return found


class Whole:
    """A whole image, scaled to fit the square, flat and filled up to the largest of the source."""

    def __init__(self, source: CocoImages, side: int, channels: int) -> None:
        self._side, self._channels = side, channels
        scaled = [self.scaled(*source.sizes(index)) for index in range(len(source))]
        self.pixels = max(channels * width * height for width, height in scaled)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the network sees."""
        factor = self._side / max(width, height)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def __call__(self, annotated: Annotated) -> dict[str, Tensor]:
        """A sample: `pixels`, and `size`: height and width of them and of the image."""
        picture = annotated.image
        size = self.scaled(*picture.size)
        values = np.array(picture.resize(size, Image.Resampling.BILINEAR))
        values = values.reshape(size[1], size[0], self._channels).transpose(2, 0, 1)
        pixels = torch.zeros(self.pixels, dtype=torch.uint8)
        pixels[: values.size] = torch.from_numpy(np.ascontiguousarray(values)).flatten()
        return {"pixels": pixels, "size": torch.tensor([size[1], size[0], picture.height, picture.width])}


def whole_images(batch: Mapping[str, Tensor], channels: int) -> list[tuple[int, Tensor, tuple[int, int]]]:
    """Of a batch the images that count: number, pixels (1, c, h, w), and the size that is measured at."""
    found = []
    parts = zip(batch["pixels"], batch["size"].tolist(), batch["image"].tolist(), strict=True)
    for pixels, (height, width, rows, columns), image in parts:
        if image >= 0:
            own = pixels[: channels * height * width].view(1, channels, height, width)
            found.append((image, own, (rows, columns)))
    return found
