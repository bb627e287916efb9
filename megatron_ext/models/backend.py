"""Which implementation stands behind each module: the one call every program makes before it imports Megatron."""

from megatron_ext import platform
from megatron_ext.ssm import mamba_ssm_api


def prepare() -> None:
    """Make Megatron usable in this process, on whatever device it has. Calling it again does nothing.

    Raises:
        ConfigError: `MEGATRON_EXT_DEVICE` cannot be satisfied.
    """
    platform.install(mamba_ssm_api)  # type: ignore[arg-type] - a module serves as the Kernels protocol
