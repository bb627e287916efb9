"""Which implementation stands behind each module: the one call every program makes before it imports Megatron."""

import logging

from megatron_ext import platform
from megatron_ext.platform import state_space
from megatron_ext.ssm import dispatch, mamba_ssm_api

logger = logging.getLogger(__name__)


def prepare(ssm: str = "auto") -> None:
    """Make Megatron usable in this process, on whatever device it has. Calling it again changes `ssm` alone.

    Args:
        ssm: Which state-space kernels run, one of `dispatch.NAMES`. By default mamba_ssm's where they are installed and
            can run, else ours, chosen by device, dtype and shape.

    Raises:
        ConfigError: `MEGATRON_EXT_DEVICE` or `ssm` cannot be satisfied.
    """
    if ssm == "mamba_ssm":
        dispatch.require_mamba_ssm()
    else:
        dispatch.set_backend(ssm)
    ours = ssm not in ("auto", "mamba_ssm")
    if not ours and not platform.installed() and platform.device_type() == "cuda" and state_space.available():
        logger.info("state-space kernels: mamba_ssm")
    platform.install(mamba_ssm_api, ours)  # type: ignore[arg-type] - a module serves as the Kernels protocol
