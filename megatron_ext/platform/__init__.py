"""Where the product runs. This folder alone replaces names of other packages, and can put every one of them back.

On a CPU, torch looks like a machine with one GPU per rank (`torch_cuda`, `tensors`, `gloo`), and Megatron's own
operations of Transformer layers have forms of ours (`transformer_layers`). Where Transformer Engine, Apex or mamba-ssm
are not installed, plain torch stands under their names (`transformer_engine`, `fused_adam`, `state_space`). On a GPU
with all of them installed only faults of megatron-core are mended (`megatron_patches`, `mamba_decode`,
`attention_cache`), and what a checkpoint's pickles may do is restricted (`loading`). `replacements.table()` lists what
is replaced and why.

`device` says which of the two it is. Doors into Megatron's own code: `megatron_patches`, `resuming`,
`bucket_padding`, `mamba_training`. Beside them what everything above needs of a machine with several ranks:
`context_parallel`, `process_groups`, `gathering`; and products that are fast here: `linear`, `grouped_linear`,
`grouped_products`, `main_grad`.
"""

import logging
import os
import warnings
from typing import TYPE_CHECKING

from megatron_ext.platform import replacements, state_space
from megatron_ext.platform.device import backend, device_type

if TYPE_CHECKING:  # torch is imported where a model runs
    from megatron_ext.platform import transformer_layers

__all__ = ["backend", "device_type", "install", "installed", "silence_warnings", "uninstall"]


def installed() -> bool:
    """Whether any name is replaced."""
    return next(replacements.table(), None) is not None


def install(
    kernels: state_space.Kernels, always: bool = False, layers: "transformer_layers.Kernels | None" = None
) -> None:
    """Prepare this process, before anything of Megatron is imported. Calling it again does nothing.

    Args:
        kernels: What stands in for mamba_ssm and causal_conv1d where they cannot run.
        always: Use `kernels` where they can run, too.
        layers: What stands in for Megatron's operations of Transformer layers on a CPU.

    Raises:
        ConfigError: `MEGATRON_EXT_DEVICE` cannot be satisfied.
    """
    if installed():
        return
    silence_warnings()
    # Megatron wants its kernels in one hardware queue under tensor and context parallelism, and refuses to start else.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_cpu = device_type() == "cpu"
    if on_cpu:
        from megatron_ext.platform import gloo, tensors, torch_cuda

        # Megatron's jit_fuser is torch.compile, which wants a C++ compiler and gains nothing on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch_cuda.install()
        tensors.install()
        gloo.install()
    from megatron_ext.platform import (
        attention_cache,
        fused_adam,
        loading,
        mamba_decode,
        mamba_training,
        megatron_patches,
        transformer_engine,
    )

    ours = always or on_cpu or not state_space.available()
    if ours:
        state_space.install(kernels)
        mamba_training.install(kernels)
    mamba_decode.install(kernels if ours else None)
    attention_cache.install()
    megatron_patches.install()
    loading.install()
    transformer_engine.install()
    if on_cpu and layers is not None:
        from megatron_ext.platform import transformer_layers

        transformer_layers.install(layers)
    fused_adam.install()


def uninstall() -> None:
    """Put every replaced name back."""
    replacements.restore()


def silence_warnings() -> None:
    """Hide the warnings of other packages about what this platform has already dealt with."""
    for message in (
        ".*Transformer Engine and Apex are not installed.*",
        ".*Apex is not installed.*",
        ".*Could not determine rank.*",
        ".*No CUDA runtime is found.*",
        ".*torch.distributed.*is deprecated.*",
        # A teacher or a model's arguments, read before the ranks have met or by each of them alone.
        ".*assuming the intent is to load in a single process.*",
        ".*argument order of load has been changed.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.WARNING)  # a line for each process group
    logging.getLogger("transformers.configuration_utils").addFilter(_not_a_tokenizers_configuration)
    # "CPU RNG state changed within GPU RNG context": on a CPU they are one and the same.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _not_a_tokenizers_configuration(record: logging.LogRecord) -> bool:
    """Whether it is not what AutoTokenizer says of a class in `auto_map`; "can yield errors" holds for models alone."""
    return "to instantiate a model of type ``" not in record.getMessage()
