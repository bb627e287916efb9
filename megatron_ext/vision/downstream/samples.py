"""The order of samples. What cannot be read is left out, named once, and counted.

In training sample i is the same image, varied the same way, whoever reads it and when, as in classification. A
validation is a round of samples that the flags fix: it has no image twice, and what is left of its last batch counts
nothing.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.errors import DataError
from megatron_ext.vision.images import seeded

logger = logging.getLogger(__name__)


class BrokenError(ValueError):
    """One image, or what is said of it, cannot be used."""


class Source(Protocol):
    """Images with what is said of them, which can be read one by one."""

    root: Any

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Which one it is, for people."""
        ...

    def read(self, index: int) -> Any:
        """It.

        Raises:
            BrokenError: It cannot be used; says why.
        """
        ...


class _Samples(Dataset):
    def __init__(self, source: Source, transform: Callable[[Any], Mapping[str, Tensor]], seed: int, count: int) -> None:
        self.source, self._transform, self._seed, self._count = source, transform, seed, count
        self._order: tuple[int, Tensor] | None = None
        self._named: set[str] = set()

    def __len__(self) -> int:
        return self._count

    def _at(self, epoch: int, place: int) -> int:
        """Which image stands there in the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.source), generator=generator)
        return int(self._order[1][place % len(self.source)])

    def _read(self, image: int) -> Any:
        try:
            return self.source.read(image)
        except BrokenError as error:
            name = self.source.name(image)
            if name not in self._named:
                self._named.add(name)
                logger.warning("left out: %s: %s", name, error)
            return None

    def _sample(self, epoch: int, place: int, index: int) -> tuple[dict[str, Tensor], int]:
        """The first readable image from a place on, and how many were left out before it."""
        for skipped in range(len(self.source)):
            if (found := self._read(self._at(epoch, place + skipped))) is not None:
                with seeded(self._seed, index):
                    return dict(self._transform(found)), skipped
        raise DataError("no image here can be read", got=self.source.root)


class TrainingSamples(_Samples):
    """So many samples, each epoch in an order of its own; `skipped` and `index` are added to each."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample.

        Raises:
            DataError: No image can be read.
            IndexError: There is no such sample.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        epoch, place = divmod(int(index), len(self.source))
        sample, skipped = self._sample(epoch, place, int(index))
        return sample | {"skipped": torch.tensor(skipped), "index": torch.tensor(int(index))}


class ValidationSamples(_Samples):
    """Rounds of samples, all in one order that the seed fixes.

    To each sample `image` is added, its number in the source, and `skipped`. A sample that counts nothing, because the
    round has more than there are images or because its own cannot be read, has -1.

    Args:
        source: The images.
        transform: From one to tensors.
        seed: Of the order.
        size: Samples of a round.
        rounds: How many.
    """

    def __init__(
        self, source: Source, transform: Callable[[Any], Mapping[str, Tensor]], seed: int, size: int, rounds: int = 1
    ) -> None:
        from megatron.core.datasets.utils import Split

        super().__init__(source, transform, seed, size * rounds)
        self._size, self.split = size, Split.valid  # by which Megatron chooses the batch size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample.

        Raises:
            DataError: No image can be read.
            IndexError: There is no such sample.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        images = len(self.source)
        place = int(index) % (self._size if self._size >= images else images)
        sample, skipped = self._sample(0, place, int(index))
        counts = place < images
        image = self._at(0, place) if counts and not skipped else -1
        return sample | {"image": torch.tensor(image), "skipped": torch.tensor(int(counts and skipped > 0))}


def rounds(args: Any, wanted: int | None, images: int) -> tuple[int, int]:
    """Samples of a validation, and how many validations there are.

    Args:
        args: Megatron's arguments.
        wanted: Samples that its loop asks for; None for one pass.
        images: In the source.
    """
    if wanted is None:
        return -(-images // args.global_batch_size) * args.global_batch_size, 1
    size = args.eval_iters * args.eval_global_batch_size
    return size, -(-wanted // size)
