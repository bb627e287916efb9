"""How annotated images become tensors: varied squares for training, whole images for validation."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.downstream.samples import BrokenError
from megatron_ext.vision.segmentation.folders import IGNORED, Annotated, SegmentationFolder
from megatron_ext.vision.segmentation.options import SegmentOptions

TRIES = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 360


class Crops:
    """A square of a scaled image, mirrored and recoloured by chance: bytes (c, side, side), classes (side, side).

    The shorter side is scaled to a random multiple of the square's; what is beyond the image is black and ignored.

    Raises:
        ConfigError: torchvision is not installed.
    """

    def __init__(self, options: SegmentOptions, model: MambaVision) -> None:
        self._options, self._side, self._channels = options, model.resolution, model.image_channels
        if options.colour and model.image_channels == 3:
            _ = self._colours

    @cached_property
    def _colours(self) -> Callable[[Image.Image], Image.Image]:
        try:
            from torchvision.transforms import ColorJitter
        except ImportError as error:
            legal = "pip install megatron-ext[vision], or --no-segment-colour"
            raise ConfigError("colours are varied by torchvision", got=error, legal=legal) from None
        return ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)

    def __call__(self, annotated: Annotated) -> dict[str, Tensor]:
        """A sample, by the random numbers of Python, NumPy and torch."""
        options, side = self._options, self._side
        picture, numbers = annotated
        factor = float(np.random.uniform(options.smallest, options.largest)) * side / min(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        numbers = np.array(Image.fromarray(numbers).resize(size, Image.Resampling.NEAREST))
        left, top = self._place(numbers)
        own = numbers[top : top + side, left : left + side]
        picture = picture.crop((left, top, min(left + side, size[0]), min(top + side, size[1])))
        if np.random.rand() < options.flip:
            picture, own = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), own[:, ::-1]
        if options.colour and self._channels == 3:
            picture = self._colours(picture)
        pixels = np.zeros((side, side, self._channels), dtype=np.uint8)
        labels = np.full((side, side), IGNORED, dtype=np.uint8)
        pixels[: own.shape[0], : own.shape[1]] = np.array(picture).reshape(*own.shape, self._channels)
        labels[: own.shape[0], : own.shape[1]] = own
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "labels": torch.from_numpy(labels)}

    def _place(self, numbers: "np.ndarray[Any, Any]") -> tuple[int, int]:
        """Left and top of a crop in which no class has too much, if some tries find one."""
        height, width = (max(1, length - self._side + 1) for length in numbers.shape)
        left = top = 0
        for _ in range(TRIES):
            left, top = int(np.random.randint(width)), int(np.random.randint(height))
            if self._options.one_class >= 1:
                break
            own = numbers[top : top + self._side, left : left + self._side]
            counts = np.bincount(own[own != IGNORED], minlength=1)
            if np.count_nonzero(counts) > 1 and counts.max() < self._options.one_class * counts.sum():
                break
        return left, top


class Whole:
    """A whole image, scaled, and its classes as they are, which is where predictions are measured.

    Images of a batch differ in size: they travel flat, filled up to the largest of the source, with their sizes.

    Args:
        source: The images.
        shorter: The shorter side to scale to; 0 for none.
        channels: Of the images.
    """

    def __init__(self, source: SegmentationFolder, shorter: int, channels: int) -> None:
        self._shorter, self._channels = shorter, channels
        self.pixels = self.labels = 0
        for index in range(len(source)):
            try:
                width, height = source.sizes(index)
            except BrokenError:
                continue
            scaled = self.scaled(width, height)
            self.pixels = max(self.pixels, channels * scaled[0] * scaled[1])
            self.labels = max(self.labels, width * height)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the network sees."""
        factor = self._shorter / min(width, height) if self._shorter else 1
        return max(1, round(width * factor)), max(1, round(height * factor))

    def __call__(self, annotated: Annotated) -> dict[str, Tensor]:
        """A sample: `pixels` and `labels` flat, `size` of both, each height and width."""
        picture, numbers = annotated
        size = self.scaled(*picture.size)
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        pixels = np.array(picture).reshape(size[1], size[0], self._channels).transpose(2, 0, 1)
        sizes = [size[1], size[0], *numbers.shape]
        return {
            "pixels": _filled(pixels, self.pixels),
            "labels": _filled(numbers, self.labels),
            "size": torch.tensor(sizes),
        }


def _filled(values: "np.ndarray[Any, Any]", length: int) -> Tensor:
    found = torch.zeros(length, dtype=torch.uint8)
    found[: values.size] = torch.from_numpy(np.ascontiguousarray(values)).flatten()
    return found
