"""Tensor placement on CPU: every spelling of a CUDA device means the host.

A `TorchFunctionMode` would be neater and does not serve: it is thread-local and off inside backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_ext.platform.replacements import replace
from megatron_ext.platform.torch_cuda import HOST

REASON = "CUDA devices mean the host (on CPU)"
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")


def on_host(device: Any) -> Any:
    """Map any spelling of a CUDA device (index, string, torch.device) to the host; leave the rest alone."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return HOST
    if isinstance(device, str):
        return HOST if device.split(":")[0] == "cuda" else device
    if isinstance(device, torch.device):
        return HOST if device.type == "cuda" else device
    return device


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"))


def _constructor(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def construct(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = on_host(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return fn(*args, **kwargs)

    return construct


def _to(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and (_is_device(args[0]) or type(args[0]) is int):
            args = (on_host(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = on_host(kwargs["device"])
        return fn(self, *args, **kwargs)

    return to


def _type(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()`: Megatron's optimizers compare it with the legacy names "torch.cuda.FloatTensor"."""

    @functools.wraps(fn)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return fn(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return fn(self, dtype, *args, **kwargs)

    return type_


def _load(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return fn(f, on_host(map_location) if _is_device(map_location) else map_location, *args, **kwargs)

    return load


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def install() -> None:
    """Replace torch's constructors and the tensor methods that take or name a device."""
    constructors = _device_constructors()
    for name, fn in list(vars(torch).items()):
        if callable(fn) and getattr(fn, "__hash__", None) is not None and fn in constructors:
            replace(torch, name, _constructor(fn), REASON)
    for name in _LIKE:
        replace(torch, name, _constructor(getattr(torch, name)), REASON)
    for name in _NEW:
        replace(torch.Tensor, name, _constructor(getattr(torch.Tensor, name)), REASON)
    replace(torch.Tensor, "to", _to(torch.Tensor.to), REASON)
    replace(torch.Tensor, "type", _type(torch.Tensor.type), REASON)
    replace(torch.Tensor, "cuda", _itself, REASON)
    replace(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "cpu"), REASON)
    replace(torch.Tensor, "pin_memory", _itself, "host memory needs no pinning (on CPU)")
    replace(torch.Tensor, "is_pinned", lambda self, *_, **__: False, "host memory needs no pinning (on CPU)")
    replace(torch.Tensor, "record_stream", lambda self, *_, **__: None, "no streams (on CPU)")
    replace(torch.nn.Module, "cuda", _itself, REASON)
    replace(torch, "load", _load(torch.load), REASON)

    real_generator, real_autocast = torch.Generator, torch.autocast

    class Generator(real_generator):
        def __new__(cls, device: Any = None) -> Any:
            return real_generator.__new__(cls, on_host(device) if device is not None else "cpu")  # type: ignore[call-arg]

    class autocast(real_autocast):  # noqa: N801 - torch's own name
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    replace(torch, "Generator", Generator, REASON)
    replace(torch, "autocast", autocast, REASON)
