"""Which implementation stands behind each module: the one call every program makes before it imports Megatron."""

import logging

from megatron_ext import platform
from megatron_ext.models.pattern import LINEAR
from megatron_ext.ops import autotune, dispatch, mamba_ssm_api, transformer_api, triton_tiles
from megatron_ext.platform import state_space

logger = logging.getLogger(__name__)


def prepare(ssm: str = "auto", shape: autotune.Shape | None = None) -> None:
    """Make Megatron usable in this process, on whatever device it has. Calling it again changes `ssm` alone.

    Args:
        ssm: Which state-space kernels run, one of `dispatch.NAMES`. By default ours, chosen by device, dtype and shape;
            where mamba_ssm's can run, too, those, or the faster ones if there is a `shape` to measure.
        shape: A Mamba-2 layer of the model; None if it has none.

    Raises:
        ConfigError: `MEGATRON_EXT_DEVICE` or `ssm` cannot be satisfied.
    """
    ours = ssm not in ("auto", "mamba_ssm")
    if ssm == "auto" and not platform.installed() and shape is not None and _has_choice(shape):
        ours = autotune.choose(shape) != "mamba_ssm"
    if ssm == "mamba_ssm":
        dispatch.require_mamba_ssm()
    else:
        dispatch.set_backend(ssm)
    if not ours and not platform.installed() and platform.device_type() == "cuda" and state_space.available():
        logger.info("state-space kernels: mamba_ssm")
    first = not platform.installed()
    platform.install(mamba_ssm_api, ours, transformer_api)  # type: ignore[arg-type] - modules serve as the protocols
    if first:
        from megatron_ext.platform.megatron_patches import know_layer

        know_layer("LINEAR", LINEAR)


def _has_choice(shape: autotune.Shape) -> bool:
    """Whether mamba_ssm's kernels and ours in Triton can both run such a layer here."""
    both = platform.device_type() == "cuda" and state_space.available()
    return both and triton_tiles.fits(shape.head_dim, shape.state) and dispatch.triton_runs()
