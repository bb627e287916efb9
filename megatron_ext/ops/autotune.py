"""Which kernels are the faster ones here: measured once on this GPU and remembered, so that ranks and runs agree.

Only where there is a choice: on a GPU on which mamba-ssm and causal-conv1d are installed and our Triton kernels run.
The first process of a node measures, the others wait for what it writes.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
WARM_UP, REPEATS = 3, 7
WAIT_SECONDS = 300.0  # that other processes wait; kernels are compiled meanwhile
MAX_VALUES = 128 * 64 * 16_384  # of x in one measurement; a layer takes about 40 bytes for each
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A Mamba-2 layer as one rank runs it, and the micro-batch that it is timed with.

    Attributes:
        heads: Of this rank: tensor parallelism divides them, and so does context parallelism.
        tokens: Of a sequence, whole under context parallelism too.
        batch: Sequences of a micro-batch.
        norm_apart: The norm is an operation by itself with our kernels as well, as under context parallelism.
    """

    heads: int = 128
    head_dim: int = 64
    state: int = 128
    groups: int = 8
    tokens: int = 4096
    dtype: str = "bfloat16"
    batch: int = 1
    norm_apart: bool = False

    def limited(self) -> "Shape":
        """The same with fewer tokens where a layer would take more memory than a measurement should."""
        width = self.heads * self.head_dim
        batch = max(1, min(self.batch, MAX_VALUES // (width * self.tokens)))
        return replace(self, batch=batch, tokens=min(self.tokens, MAX_VALUES // (width * batch)))


def cache_path() -> Path:
    """Where choices are remembered: `$XDG_CACHE_HOME` or `~/.cache`, /megatron_ext/state_space.json."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "megatron_ext" / "state_space.json"


def choose(
    shape: Shape,
    candidates: Callable[[Shape], Mapping[str, Run]] | None = None,
    clock: Callable[[], float] | None = None,
    cache: Path | None = None,
    machine: str | None = None,
) -> str:
    """The name of the fastest candidate: the one remembered for this machine and shape, or else measured now.

    Args:
        shape: The layer.
        candidates: Forward and backward of it by name; ours in Triton and mamba-ssm's by default.
        clock: Seconds, once everything before is done.
        cache: The file of choices; `cache_path()` by default.
        machine: What a choice holds for; this GPU and the versions of the kernels by default.
    """
    path = cache or cache_path()
    key = json.dumps([machine or _machine(), asdict(shape)])
    entry = _read(path).get(key) or (None if _measures_here() else _wait_for_choice(path, key))
    if entry is not None:
        logger.info("state-space kernels: %s (the fastest of %s, measured before)", entry["choice"], entry["seconds"])
        return entry["choice"]
    seconds = measure((candidates or _on_this_gpu)(shape), clock or _after_the_gpu)
    choice = min(seconds, key=lambda name: seconds[name])
    rounded = {name: round(value, 6) for name, value in seconds.items()}
    logger.info("state-space kernels: %s (the fastest of %s, measured now)", choice, rounded)
    return _store(path, key, {"choice": choice, "seconds": rounded})


def measure(candidates: Mapping[str, Run], clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, after a warm-up in which they may compile.

    One that cannot run this shape drops out; if none can, the last one's exception is raised.
    """
    runnable: dict[str, Run] = {}
    failure: Exception | None = None
    for name, run in candidates.items():
        try:
            for _ in range(WARM_UP):
                run()
            runnable[name] = run
        except Exception as error:  # whatever a compiler or a kernel of another package raises
            failure = error
            logger.warning("state-space kernels: %s cannot run this layer: %s", name, error)
    if failure is not None and not runnable:
        raise failure
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for _ in range(REPEATS):
        for name, run in runnable.items():
            begun = clock()
            run()
            times[name].append(clock() - begun)
    return {name: statistics.median(each) for name, each in times.items()}


def _measures_here() -> bool:
    """Whether this is the process of its node that measures."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _wait_for_choice(path: Path, key: str, seconds_to_wait: float = WAIT_SECONDS) -> dict | None:
    """What the first process of the node finds; None if it takes too long."""
    until = time.monotonic() + seconds_to_wait
    while time.monotonic() < until:
        if (entry := _read(path).get(key)) is not None:
            return entry
        time.sleep(0.5)
    return None


def _read(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _store(path: Path, key: str, entry: dict) -> str:
    """Add a choice, unless another run was first; the choice that holds."""
    entries = _read(path)
    if key not in entries:
        entries[key] = entry
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
            Path(file.name).replace(path)
        except OSError as error:
            logger.warning("state-space kernels: the choice cannot be kept, and is made again each time: %s", error)
    return entries[key]["choice"]


def _after_the_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _machine() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "mamba_ssm")]
    return ", ".join([torch.cuda.get_device_name(), *versions, f"our kernels {kernel_version()}"])


def kernel_version() -> str:
    """A hash of our kernels' source, which changes more often than a version number."""
    sources = sorted(Path(__file__).parent.rglob("triton*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _on_this_gpu(shape: Shape, device: str = "cuda") -> dict[str, Run]:
    """Convolution, scan, gate and norm, forward and backward, by our kernels and by mamba-ssm's.

    As Megatron's mixer calls them: with tokens before sequences, and ours as `platform/mamba_training.py` does.
    """
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm  # type: ignore[import-not-found]
    from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found]
        mamba_split_conv1d_scan_combined,
    )

    from megatron_ext.ops.gated_norm.triton import gated_rms_norm
    from megatron_ext.ops.mamba_mixer.projection import Projection
    from megatron_ext.ops.mamba_mixer.triton import conv_scan_norm

    projection = Projection(shape.heads, shape.head_dim, shape.groups)
    inner = projection.inner
    convolved, group = inner + 2 * shape.groups * shape.state, inner // shape.groups
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, shape.dtype)}

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, **kind).requires_grad_()

    zxbcdt = normal(shape.tokens, shape.batch, inner + convolved + shape.heads)
    weight, bias = normal(convolved, 4), normal(convolved)
    step = torch.full((shape.heads,), -3.0, device=device)
    decay, skip = -torch.ones(shape.heads, device=device), torch.ones(shape.heads, device=device)
    norm = RMSNorm(inner, group_size=group, norm_before_gate=False, **kind)

    def backward(y: Tensor) -> None:
        y.transpose(0, 1).contiguous().sum().backward()

    def ours() -> None:
        layer = weight, bias, step, decay, skip, projection
        if not shape.norm_apart:
            y, _ = conv_scan_norm(zxbcdt.transpose(0, 1), *layer, norm_weight=norm.weight, norm_before_gate=False)
            return backward(y)
        y, _ = conv_scan_norm(zxbcdt.transpose(0, 1).contiguous(), *layer)
        return backward(gated_rms_norm(y, norm.weight, None, norm.eps, group, False))

    def theirs() -> None:
        y = mamba_split_conv1d_scan_combined(
            zxbcdt.transpose(0, 1).contiguous(), weight, bias, step, decay, skip, 256,
            headdim=shape.head_dim, ngroups=shape.groups,
        )  # fmt: skip
        backward(norm(y))

    return {"triton": ours, "mamba_ssm": theirs}
