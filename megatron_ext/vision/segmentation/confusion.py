"""Mean intersection over union: of each class over all images at once, then the mean over classes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.vision.segmentation.folders import IGNORED


class Confusion:
    """How often each class was taken for each, over all images and ranks.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._counts: Tensor | None = None

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Take in an image: two maps of class numbers, where `IGNORED` ones do not count."""
        known = labels != IGNORED
        pairs = labels[known].long() * self._classes + predicted[known].long()
        found = torch.bincount(pairs, minlength=self._classes**2).view(self._classes, self._classes)
        self._counts = found if self._counts is None else self._counts + found

    def take(self, group: Any = None, device: Any = None) -> Tensor:
        """The counts (true class, predicted class) of all ranks of a group; begins again."""
        counts, self._counts = self._counts, None
        if counts is None:
            counts = torch.zeros(self._classes, self._classes, dtype=torch.int64, device=device)
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts


def scores(counts: Tensor) -> dict[str, float]:
    """`miou`, `mean_accuracy` (of each class's pixels) and `pixel_accuracy`; NaN where no pixel has a class.

    A class that is neither annotated nor predicted has no part in the first, one that is not annotated none in the
    second.
    """
    counts = counts.double()
    right, true, said = counts.diag(), counts.sum(1), counts.sum(0)
    return {
        "miou": float((right / (true + said - right)).nanmean()),
        "mean_accuracy": float((right / true).nanmean()),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
