"""What a network is measured on: a part of the validation images has all classes, all of them come once."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from vision_oracle import SMALL

from megatron_ext.models.bootstrap import prepare
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.average import WeightAverage
from megatron_ext.vision.network import Network
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_sample_of_a_micro_batch_is_known_without_looking(ranks: int, monkeypatch: Any) -> None:
    """As Megatron's sampler hands them out, in each micro-batch of each step, also of one that is run again."""
    from megatron.core import mpu, num_microbatches_calculator
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megatron_ext.vision.task import Place

    monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: 3)
    monkeypatch.setattr(mpu, "get_data_parallel_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(mpu, "get_data_parallel_rank", lambda rank=rank: rank)
        args = Namespace(consumed_train_samples=12 * ranks, micro_batch_size=4)
        sampler = iter(MegatronPretrainingSampler(96, args.consumed_train_samples, 4, rank, ranks))
        place = Place(args)
        for step in range(2):
            expected = [next(sampler)[0] for _ in range(3)]
            for _ in range(2 if step == 1 else 1):
                assert [place.first_sample() for _ in range(3)] == expected
            args.consumed_train_samples += 12 * ranks


class Asynchronous(TorchDispatchMode):
    """Fails where the host asks a tensor for a number, for which it would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_asks_no_tensor_for_a_number() -> None:
    from megatron_ext.vision.task import Mixing, losses

    network = Network(SMALL)
    average, mixing = WeightAverage(network, 0.9), Mixing(ImageOptions(), 5, seed=1)
    batch = {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 3, 4, 1]), "skipped": torch.zeros(4).long()}
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Asynchronous():
        int(batch["label"][0])
    with Asynchronous():
        for step in range(2):
            average.update(step)
        for first in (0, 4, 8, 12):  # mixup and cutmix, by chance
            image, target = mixing(batch["image"], batch["label"], first)
            logits = average(image)
            losses(batch | {"target": target, "average": logits}, logits, mesa=1.0)
