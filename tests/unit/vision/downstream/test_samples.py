"""The order of samples: each image once in a validation, whatever the batch; broken ones left out and counted."""

import logging
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import DataError
from megatron_ext.models.bootstrap import prepare
from megatron_ext.vision.downstream.samples import BrokenError, TrainingSamples, ValidationSamples, rounds

prepare()  # before Megatron is imported


class Numbers:
    """Five things, of which some are broken."""

    root = Path("numbers")

    def __init__(self, *broken: int) -> None:
        self._broken = broken

    def __len__(self) -> int:
        return 5

    def name(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int) -> int:
        if index in self._broken:
            raise BrokenError("it is broken")
        return index


def told(number: int) -> dict[str, torch.Tensor]:
    return {"number": torch.tensor(number), "chance": torch.rand(())}


def images(samples: Any, first: int, last: int) -> list[int]:
    return [int(samples[index]["image"]) for index in range(first, last)]


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_no_image_is_twice_in_a_validation(size: int) -> None:
    """Of rounds smaller than the set as of larger ones, in which each image is and the rest counts nothing."""
    samples = ValidationSamples(Numbers(), told, seed=3, size=size, rounds=4)
    assert len(samples) == 4 * size
    for begin in range(0, len(samples), size):
        counted = [image for image in images(samples, begin, begin + size) if image >= 0]
        assert len(counted) == len(set(counted)) == min(size, 5)
    numbers = {int(s["image"]): int(s["number"]) for s in (samples[i] for i in range(4 * size)) if s["image"] >= 0}
    assert all(image == number for image, number in numbers.items())


def test_what_is_broken_counts_nothing_in_a_validation(caplog: pytest.LogCaptureFixture) -> None:
    samples = ValidationSamples(Numbers(1, 4), told, seed=3, size=8)
    with caplog.at_level(logging.WARNING):
        found = [samples[index] for index in range(8)]
    assert sorted(int(s["image"]) for s in found) == [-1] * 5 + [0, 2, 3]
    assert sum(int(s["skipped"]) for s in found) == 2
    assert Counter(r.getMessage() for r in caplog.records) == {
        f"left out: number {index}: it is broken": 1 for index in (1, 4)
    }


def test_training_goes_on_with_the_next_one() -> None:
    """Each epoch has an order of its own; sample i is the same whoever reads it and when."""
    samples, again = (TrainingSamples(Numbers(2), told, seed=3, count=20) for _ in range(2))
    found = [samples[index] for index in range(20)]
    epochs = [[int(s["number"]) for s in found[begin : begin + 5]] for begin in range(0, 20, 5)]
    assert all(set(epoch) == {0, 1, 3, 4} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [sum(int(s["skipped"]) for s in found[begin : begin + 5]) for begin in range(0, 20, 5)] == [1] * 4
    for index in reversed(range(20)):
        assert again[index] == found[index]
    with pytest.raises(IndexError):
        samples[20]


def test_nothing_readable_is_told() -> None:
    with pytest.raises(DataError, match="no image here can be read"):
        ValidationSamples(Numbers(*range(5)), told, seed=3, size=5)[0]


def test_rounds_of_a_run() -> None:
    """One pass in whole batches with --skip-train, else what Megatron asks for, in parts of a validation."""
    args = Namespace(global_batch_size=4, eval_global_batch_size=4, eval_iters=3)
    assert rounds(args, None, 5) == (8, 1)
    assert rounds(args, 36, 5) == (12, 3)
