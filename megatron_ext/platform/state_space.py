"""Our state-space kernels under mamba_ssm's and causal_conv1d's module names (where those are not installed).

`MambaMixer` imports its kernels by these names and has no other door. The implementations are handed in by the caller,
because the platform lies below the kernels.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any, Protocol

from megatron_ext.platform.replacements import replace


class Kernels(Protocol):
    """The functions and the class that `MambaMixer` looks for."""

    RMSNorm: Any
    mamba_chunk_scan_combined: Any
    mamba_split_conv1d_scan_combined: Any
    causal_conv1d_fn: Any
    causal_conv1d_update: Any
    selective_state_update: Any


class _ModuleTable:
    """`sys.modules` with attribute access, so that `replace` and `restore` serve it too."""

    def __init__(self) -> None:
        self.__dict__ = sys.modules


def _module(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # type: ignore[attr-defined]
    module.__dict__.update(attributes)
    replace(_ModuleTable(), name, module, "our kernels under this package's name (package absent)")


def available() -> bool:
    """Whether the compiled packages are installed and can run here (they need a CUDA device)."""
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


def install(kernels: Kernels) -> None:
    """Register `kernels` as mamba_ssm and causal_conv1d."""
    _module("mamba_ssm", __version__="2.3.2")
    _module("mamba_ssm.ops")
    _module("mamba_ssm.ops.triton")
    _module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=kernels.RMSNorm)
    _module(
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_chunk_scan_combined=kernels.mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined=kernels.mamba_split_conv1d_scan_combined,
    )
    _module("causal_conv1d", __version__="1.7.0", causal_conv1d_fn=kernels.causal_conv1d_fn)
    _module("causal_conv1d.causal_conv1d_varlen", causal_conv1d_varlen_states=None)
