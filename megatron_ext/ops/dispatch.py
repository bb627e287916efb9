"""Which implementation of the state-space operations runs."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.ops import triton_tiles
from megatron_ext.ops.causal_conv1d import cpu as conv_cpu
from megatron_ext.ops.causal_conv1d import naive as conv_naive
from megatron_ext.ops.causal_conv1d.decode import conv_step
from megatron_ext.ops.gated_norm import cpu as norm_cpu
from megatron_ext.ops.gated_norm import naive as norm_naive
from megatron_ext.ops.mamba_mixer import cpu as mixer_cpu
from megatron_ext.ops.mamba_mixer import naive as mixer_naive
from megatron_ext.ops.selective_scan import cpu as selective_cpu
from megatron_ext.ops.selective_scan import naive as selective_naive
from megatron_ext.ops.ssd import cpu as ssd_cpu
from megatron_ext.ops.ssd import naive as ssd_naive
from megatron_ext.ops.ssd.decode import state_step
from megatron_ext.platform.device import device_type

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations, with the signatures and the meaning of the naive ones.

    Attributes:
        name: What `--ext-ssm-backend` calls it.
        ssd: The scan.
        causal_conv1d: The convolution before it.
        gated_rms_norm: The norm after it.
        conv_scan_norm: Convolution, scan, norm and gate at once (`mamba_mixer`).
        conv_step: The convolution of one more token.
        state_step: The scan of one more token.
        selective_scan: Mamba-1's scan.
    """

    name: str
    ssd: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]
    conv_scan_norm: Callable[..., tuple[Tensor, Tensor]]
    conv_step: Callable[..., Tensor]
    state_step: Callable[..., Tensor]
    selective_scan: Callable[..., tuple[Tensor, Tensor]]


_TORCH_BACKENDS = {
    "naive": Backend(
        "naive", ssd_naive.ssd, conv_naive.causal_conv1d, norm_naive.gated_rms_norm, mixer_naive.conv_scan_norm,
        conv_step, state_step, selective_naive.selective_scan,
    ),
    "torch": Backend(
        "torch", ssd_cpu.ssd, conv_cpu.causal_conv1d, norm_cpu.gated_rms_norm, mixer_cpu.conv_scan_norm,
        conv_step, state_step, selective_cpu.selective_scan,
    ),
}  # fmt: skip
NAMES = ("auto", *_TORCH_BACKENDS, "triton", "mamba_ssm")
_chosen: Backend | None = None


def backend(
    name: str = "auto", x: Tensor | None = None, *, channels: int = 1, state: int = 1, taps: int = 1
) -> Backend:
    """The implementation of that name; `auto` is the one set by `set_backend`, or else the fastest that runs here.

    Args:
        name: One of `NAMES`.
        x: The input of the operation, for the automatic choice: its device and dtype count.
        channels: Channels of a head.
        state: State size.
        taps: Taps of the convolution.

    Raises:
        ConfigError: No such name, or something it needs is missing.
    """
    if name == "auto":
        return _chosen or _automatic(x, channels, state, taps)
    if name in _TORCH_BACKENDS:
        return _TORCH_BACKENDS[name]
    if name == "triton":
        return _triton()
    if name == "mamba_ssm":
        require_mamba_ssm()
        what = "Megatron calls mamba_ssm by itself where it can run; it is not reached through this dispatch"
        raise ConfigError(what, got=name, legal=", ".join(("auto", *_TORCH_BACKENDS, "triton")))
    raise ConfigError("no such state-space backend", got=name, legal=nearest(name, NAMES))


def set_backend(name: str) -> Backend | None:
    """Make that implementation the one behind `backend("auto")` in this process; `auto` takes the choice back.

    Raises:
        ConfigError: No such name, or something it needs is missing.
    """
    global _chosen
    if name == "auto":
        _chosen = None
        return None
    chosen = backend(name)
    if chosen is not _chosen:
        logger.info("state-space kernels: %s", chosen.name)
    _chosen = chosen
    return chosen


def require_mamba_ssm() -> None:
    """Check that the packages mamba_ssm and causal_conv1d are there, and a CUDA device for them.

    Raises:
        ConfigError: They are not.
    """
    missing = [f"{package} not installed" for package in ("mamba_ssm", "causal_conv1d") if not _installed(package)]
    if not missing and device_type() == "cpu":
        missing = ["no CUDA device"]
    if missing:
        what = "the mamba_ssm kernels cannot run: " + ", ".join(missing)
        raise ConfigError(what, got="mamba_ssm", legal=", ".join(("auto", *_TORCH_BACKENDS, "triton")))


def _installed(package: str) -> bool:
    return PathFinder.find_spec(package) is not None  # not importlib.util's: a stand-in of that name is in sys.modules


def _automatic(x: Tensor | None, channels: int, state: int, taps: int) -> Backend:
    """Triton on a GPU for every dtype and size its tiles are made for, else torch."""
    fits = x is not None and x.device.type == "cuda" and x.dtype in triton_tiles.DTYPES
    fits = fits and triton_tiles.fits(channels, state) and taps <= triton_tiles.MAX_TAPS
    chosen = _triton() if fits and triton_runs() else _TORCH_BACKENDS["torch"]
    where = "no input" if x is None else f"{x.device.type}, {str(x.dtype).removeprefix('torch.')}"
    _log_choice(chosen.name, where)
    return chosen


@functools.cache
def _log_choice(name: str, why: str) -> None:
    logger.info("state-space kernels: %s (chosen for %s)", name, why)


@functools.cache
def triton_runs() -> bool:
    """Whether Triton is there, and the GPU has matrix units for bfloat16 and the shared memory our tiles take."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability() < (8, 0):
        return False
    return torch.cuda.get_device_properties().shared_memory_per_block_optin >= triton_tiles.MIN_SHARED_MEMORY


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("the Triton state-space kernels need Triton", got="triton not installed", legal="torch")
    from megatron_ext.ops import triton_jit

    if device_type() == "cpu" and not triton_jit.INTERPRETED:
        raise ConfigError(
            "the Triton state-space kernels need a CUDA device", got="--ext-ssm-backend triton",
            legal="auto, torch; or TRITON_INTERPRET=1 in the environment, to check them on a CPU, very slowly",
        )  # fmt: skip
    return _import_triton()


@functools.cache
def _import_triton() -> Backend:
    from megatron_ext.ops.causal_conv1d import triton as conv
    from megatron_ext.ops.gated_norm import triton as norm
    from megatron_ext.ops.mamba_mixer import triton as mixer
    from megatron_ext.ops.selective_scan import triton as selective
    from megatron_ext.ops.ssd import triton as ssd
    from megatron_ext.ops.ssd import triton_decode

    return Backend(
        "triton", ssd.ssd, conv.causal_conv1d, norm.gated_rms_norm, mixer.conv_scan_norm,
        conv.conv_step, triton_decode.state_step, selective.selective_scan,
    )  # fmt: skip
