import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.platform import device


@pytest.fixture
def choose(monkeypatch):
    """device_type() under a value of the variable, on a machine with or without a GPU."""

    def run(asked: str | None, *, gpu: bool) -> tuple[str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.delenv(device.VARIABLE, raising=False)
        if asked is not None:
            monkeypatch.setenv(device.VARIABLE, asked)
        device.device_type.cache_clear()
        return device.device_type(), device.backend()

    yield run
    device.device_type.cache_clear()


@pytest.mark.parametrize(
    ("asked", "gpu", "chosen"),
    [
        (None, False, ("cpu", "gloo")),
        (None, True, ("cuda", "nccl")),
        ("auto", False, ("cpu", "gloo")),
        ("auto", True, ("cuda", "nccl")),
        ("cpu", True, ("cpu", "gloo")),
        ("cuda", True, ("cuda", "nccl")),
    ],
)
def test_device(choose, asked, gpu, chosen):
    assert choose(asked, gpu=gpu) == chosen


@pytest.mark.parametrize("asked", ["gpu", "", "CUDA", "cuda:0"])
def test_another_name_is_refused(choose, asked):
    with pytest.raises(ConfigError, match=r"does not name a device[\s\S]*legal: auto, cpu, cuda"):
        choose(asked, gpu=True)


def test_cuda_is_not_silently_replaced_by_the_cpu(choose):
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        choose("cuda", gpu=False)
