"""Which implementation of the state-space operations runs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder

from torch import Tensor

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.ssm import chunk, conv, naive, norm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation: the three operations, with the signatures and the meaning of those in `naive.py`."""

    name: str
    ssd: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]


_BUILT = {
    "naive": Backend("naive", naive.ssd, naive.causal_conv1d, naive.gated_rms_norm),
    "torch": Backend("torch", chunk.ssd, conv.causal_conv1d, norm.gated_rms_norm),
}
NAMES = ("auto", *_BUILT, "triton", "mamba_ssm")
_chosen: Backend | None = None


def backend(name: str = "auto") -> Backend:
    """The implementation of that name; `auto` is the one set by `set_backend`, or else the fastest that runs here.

    Raises:
        ConfigError: No such name, or something it needs is missing.
    """
    if name == "auto":
        return _chosen or set_backend("torch")
    if name in _BUILT:
        return _BUILT[name]
    if name == "triton":
        raise ConfigError("the Triton state-space kernels are not built", got=name, legal=", ".join(("auto", *_BUILT)))
    if name == "mamba_ssm":
        missing = [package for package in ("mamba_ssm", "causal_conv1d") if PathFinder.find_spec(package) is None]
        what = "the mamba_ssm kernels are not importable: " + ", ".join(missing) + " not installed"
        if not missing:
            what = "Megatron calls mamba_ssm by itself where it can run; it is not reached through this dispatch"
        raise ConfigError(what, got=name, legal=", ".join(("auto", *_BUILT)))
    raise ConfigError("no such state-space backend", got=name, legal=nearest(name, NAMES))


def set_backend(name: str) -> Backend:
    """Make that implementation the one behind `backend("auto")` in this process; `auto` takes the choice back.

    Raises:
        ConfigError: No such name, or something it needs is missing.
    """
    global _chosen
    if name == "auto":
        _chosen = None
        return backend()
    chosen = backend(name)
    if chosen is not _chosen:
        logger.info("state-space kernels: %s", chosen.name)
    _chosen = chosen
    return chosen
