"""Mean intersection over union, on cases with known answers and against sets of pixels."""

import math

import pytest
import torch

from megatron_ext.vision.segmentation.confusion import Confusion, scores
from megatron_ext.vision.segmentation.folders import IGNORED


def measured(classes: int, *pairs: tuple[list[int], list[int]]) -> dict[str, float]:
    confusion = Confusion(classes)
    for predicted, labels in pairs:
        confusion.add(torch.tensor(predicted), torch.tensor(labels, dtype=torch.uint8))
    return scores(confusion.take())


def test_known_answers() -> None:
    """One class of two, half right: 2 of 4 pixels of class 0, all of class 1 and two more."""
    found = measured(2, ([0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]))
    assert found == pytest.approx(
        {"miou": (2 / 4 + 2 / 4) / 2, "mean_accuracy": (0.5 + 1) / 2, "pixel_accuracy": 4 / 6}
    )
    assert measured(3, ([0, 1], [0, 1])) == {"miou": 1, "mean_accuracy": 1, "pixel_accuracy": 1}  # class 2 is nowhere
    found = measured(3, ([0, 2], [0, 0]))
    assert found["miou"] == pytest.approx((1 / 2 + 0) / 2), "what is said and never true is wrong"
    assert found["mean_accuracy"] == pytest.approx(1 / 2)
    assert math.isnan(measured(2, ([0], [IGNORED]))["miou"])


def test_it_is_of_the_whole_set_and_not_a_mean_over_images() -> None:
    pairs = [([0, 0, 0, 1], [0, 0, 0, 0]), ([1, 1], [1, 1])]
    assert measured(2, *pairs)["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert measured(2, *pairs) == measured(2, ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]))


def test_it_is_that_of_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 5, (40, 50), generator=generator)
    labels = torch.randint(0, 6, (40, 50), generator=generator)
    labels[labels == 5] = IGNORED
    said, true = ({c: set() for c in range(5)} for _ in range(2))
    for place, (a, b) in enumerate(zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True)):
        if b != IGNORED:
            said[a].add(place)
            true[b].add(place)
    expected = sum(len(said[c] & true[c]) / len(said[c] | true[c]) for c in range(5)) / 5
    confusion = Confusion(5)
    for rows in range(0, 40, 10):
        confusion.add(predicted[rows : rows + 10], labels[rows : rows + 10].to(torch.uint8))
    assert scores(confusion.take())["miou"] == pytest.approx(expected)
    assert confusion.take().sum() == 0, "it begins again"
