"""For every test: shapes in signatures are checked, and GPU tests run only where there is a GPU."""

import os
import signal

import pytest
import torch
from jaxtyping import install_import_hook

# The modules with shapes in their signatures. Before any test imports them: jaxtyping's shapes then are checked at each
# call, and across the arguments of one call. (Not the modules of Triton kernels, whose source Triton itself reads.)
CHECKED = [
    *(f"megatron_ext.ops.{name}" for name in ("mamba_ssm_api", "silu")),
    *(f"megatron_ext.ops.causal_conv1d.{name}" for name in ("naive", "cpu", "decode", "triton")),
    *(f"megatron_ext.ops.gated_norm.{name}" for name in ("naive", "cpu", "triton")),
    *(f"megatron_ext.ops.mamba_mixer.{name}" for name in ("projection", "naive", "cpu", "triton")),
    *(f"megatron_ext.ops.ssd.{name}" for name in ("naive", "step_sizes", "cpu", "cpu_chunks", "cpu_decays", "decode")),
    *(f"megatron_ext.ops.ssd.{name}" for name in ("triton", "triton_decode")),
    *(f"megatron_ext.ops.selective_scan.{name}" for name in ("naive", "cpu", "exportable", "triton")),
    *(f"megatron_ext.platform.{name}" for name in ("context_parallel", "linear")),
    *(f"megatron_ext.distillation.{name}" for name in ("intermediate_layers", "model", "projections", "student")),
    *(f"megatron_ext.distillation.{name}" for name in ("teachers", "logit_cache.cache", "logit_cache.shards")),
    "megatron_ext.data.sample_id",
    "megatron_ext.models.hooks",
    "megatron_ext.pruning.importance",
    "megatron_ext.pruning.expert_importance",
    "megatron_ext.training.step",
    *(f"megatron_ext.inference.{name}" for name in ("generate", "prompts", "sampling", "score", "sharded")),
    "megatron_ext.lm_head",
]
install_import_hook(CHECKED, "beartype.beartype")

# What says which of how many processes this is. A command line that is validated in the test's own process sets it.
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANKS = {name: os.environ.get(name) for name in NAMES}

# What ends a process. A handler that a test leaves behind is one of its forks, too, and lets none of a pool's end.
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

HAS_GPU = torch.cuda.is_available()  # asked once, before a test makes the CPU look like one

# What tests start (torchrun workers, our own programs) inherits this: two busy thread pools on one core are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked `gpu` where there is no CUDA device.

    Those marked `triton` also run in a process with Triton's interpreter, which `test_triton_interpreter.py` starts.
    """
    if HAS_GPU:
        return
    marks = ["gpu"] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu", "triton"]
    gpu = [item for item in items if any(item.get_closest_marker(mark) for mark in marks)]
    if gpu:
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)
        config.stash[DESELECTED] = len(gpu)


DESELECTED = pytest.StashKey[int]()


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Say why they are deselected."""
    count = config.stash.get(DESELECTED, 0)
    return [f"deselected {count} tests marked gpu or triton: torch sees no CUDA device"] if count else []


@pytest.fixture(autouse=True)
def _nothing_left_over():
    """Programs that later tests start are no ranks of a job that was only validated, and end when they are told to."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    for name, value in RANKS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
