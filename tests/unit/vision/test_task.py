"""What a network is measured on: a part of the validation images has all classes, all of them come once."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from megatron_ext.models.bootstrap import prepare
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.options import AverageOptions, ImageOptions

prepare()  # before Megatron is imported


@pytest.fixture
def valid(tmp_path: Path) -> Any:
    """Of a number of samples the validation images: three classes of twelve, one after the other on disk."""
    from megatron_ext.vision.task import classification

    for name in ("blue", "green", "red"):
        (tmp_path / name).mkdir()
        for index in range(12):
            Image.new("RGB", (32, 32), name).save(tmp_path / name / f"{index}.png")
    model = MambaVision(pattern="C/C/MS/M", dim=16, head_dim=16, resolution=32)
    options = {"images": ImageOptions(valid=str(tmp_path)), "average": AverageOptions()}
    run: Any = SimpleNamespace(model=model, options=options, args=Namespace(seed=1234))
    return lambda count: classification(run).datasets([0, count, 0])[1]


def test_a_few_batches_have_all_classes(valid: Any) -> None:
    labels = [int(sample["label"]) for sample in valid(12)]
    assert set(labels) == {0, 1, 2}
    assert labels == [int(sample["label"]) for sample in valid(12)]


def test_one_pass_has_each_image_once(valid: Any) -> None:
    assert sorted(int(sample["label"]) for sample in valid(None)) == [0] * 12 + [1] * 12 + [2] * 12
