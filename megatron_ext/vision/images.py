"""Images as a data set: sample i of a run is the same image, varied the same way, whoever reads it and when.

An image that cannot be read is left out: the next one of its epoch takes its place, it is named once, and how many
were left out is a metric of the batch.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.sources import Source

logger = logging.getLogger(__name__)
MODES = {1: "L", 3: "RGB"}


class Images(Dataset):
    """Samples of a source: image (c, h, w) float32, label, and how many files before it could not be read.

    Args:
        source: The images.
        transform: From a picture to a tensor.
        channels: 1 or 3.
        seed: Of order and variation.
        count: Samples; the source begins anew as often as it takes. By default one pass.
        shuffled: Whether each epoch has an order of its own.
    """

    def __init__(
        self, source: Source, transform: Callable[[Any], Tensor], channels: int, seed: int, count: int | None = None,
        shuffled: bool = False,
    ) -> None:  # fmt: skip
        self._source, self._transform, self._mode = source, transform, MODES[channels]
        self._seed, self._shuffled = seed, shuffled
        self._count = len(source) if count is None else count
        self._order: tuple[int, Tensor] | None = None
        self._named: set[str] = set()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample.

        Raises:
            DataError: No image of the source can be read.
            IndexError: There is no such sample.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        epoch, place = divmod(int(index), len(self._source))
        for skipped in range(len(self._source)):
            image = self._at(epoch, (place + skipped) % len(self._source))
            picture = self._read(image)
            if picture is not None:
                with seeded(self._seed, int(index)):
                    pixels = self._transform(picture)
                numbers = {"label": self._source.label(image), "skipped": skipped}
                return {"image": pixels} | {name: torch.tensor(value) for name, value in numbers.items()}
        raise DataError("no image here can be read", got=self._source.root)

    def _at(self, epoch: int, place: int) -> int:
        """Which image stands there in the order of an epoch."""
        if not self._shuffled:
            return place
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._source), generator=generator)
        return int(self._order[1][place])

    def _read(self, image: int) -> Any:
        try:
            with Image.open(BytesIO(self._source.read(image))) as picture:
                return picture.convert(self._mode)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            name = self._source.name(image)
            if name not in self._named:
                self._named.add(name)
                logger.warning("an image cannot be read and is left out: %s: %s", name, error)
            return None


@contextmanager
def seeded(seed: int, index: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch that depend on these two alone; then those of before go on."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    own = np.random.SeedSequence([seed, index]).generate_state(1)[0].item()
    random.seed(own)
    np.random.seed(own)
    torch.default_generator.manual_seed(own)  # and not a GPU's, which would not be put back
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Variations:
    """How pictures become tensors, by timm.

    Args:
        options: The flags.
        model: For its resolution and channels.

    Raises:
        ConfigError: timm is not installed, or does not know the policy.
    """

    def __init__(self, options: ImageOptions, model: MambaVision) -> None:
        try:
            import timm.data  # noqa: F401
        except ImportError as error:
            legal = "pip install megatron-ext[vision]"
            raise ConfigError("images are varied by timm", got=error, legal=legal) from None
        if model.image_channels not in MODES:
            raise ConfigError("--mambavision-image-channels", got=model.image_channels, legal="1 or 3")
        self._options, self._size = options, (model.image_channels, model.resolution, model.resolution)
        try:
            _ = self.training
        except Exception as error:  # whatever timm's parser of names raises
            what = f"timm does not know this policy ({type(error).__name__}: {error})"
            raise ConfigError(
                what, got=f"--images-augment {options.augment}", legal="rand-m9-mstd0.5-inc1, none"
            ) from error

    @cached_property
    def training(self) -> Callable[[Any], Tensor]:
        """A crop of any size, a flip, a policy and an erased rectangle, each by chance."""
        policy = None if self._options.augment == "none" else self._options.augment
        return self._made(
            is_training=True,
            interpolation="random",  # bilinear or bicubic
            auto_augment=policy,
            color_jitter=0.0,
            re_prob=self._options.erasing,
            re_mode="pixel",
            scale=(self._options.smallest, 1.0),
            hflip=self._options.flip,
        )

    @cached_property
    def validation(self) -> Callable[[Any], Tensor]:
        """The middle of the image."""
        return self._made(crop_pct=self._options.crop or 1.0, interpolation=self._options.interpolation or "bicubic")

    def _made(self, **more: Any) -> Callable[[Any], Tensor]:
        from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
        from timm.data import IMAGENET_DEFAULT_STD as STD
        from timm.data.transforms_factory import create_transform

        colours = {"mean": MEAN, "std": STD} if self._size[0] == 3 else {"mean": (0.5,), "std": (0.5,)}
        return create_transform(self._size, **colours, **more)  # type: ignore[arg-type]
