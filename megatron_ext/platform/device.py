"""Where this process runs: a CUDA device, or the host."""

import functools
import os

from megatron_ext.errors import ConfigError

VARIABLE = "MEGATRON_EXT_DEVICE"
CHOICES = ("auto", "cpu", "cuda")


@functools.cache
def device_type() -> str:
    """`cuda` or `cpu`: what `MEGATRON_EXT_DEVICE` says, by default cuda where there is one.

    Raises:
        ConfigError: The variable has another value, or asks for a CUDA device that is not there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ConfigError(f"{VARIABLE} does not name a device", got=asked, legal=", ".join(CHOICES))
    import torch  # here, because it takes a second, and whoever mistypes a flag need not wait for it

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise ConfigError(f"{VARIABLE}=cuda, and torch sees no CUDA device", got=asked, legal="auto, cpu")
    return "cuda" if found and asked != "cpu" else "cpu"


def device_name() -> str:
    """What the GPU is called, such as `NVIDIA H100 80GB HBM3`; empty on a CPU."""
    if device_type() == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name()


def backend() -> str:
    """The process-group backend of this device: nccl or gloo."""
    return "nccl" if device_type() == "cuda" else "gloo"
