"""`torch.cuda` on host memory: one "GPU" per rank, with streams that are always in order and always done.

Megatron-Core asks `torch.cuda` for a device, streams, events, random state and memory figures. On a CPU each of these
has an honest counterpart: the host, the program order, the wall clock, torch's CPU generator, the process's memory.
"""

import contextlib
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.platform.replacements import replace

HOST = torch.device("cpu")
REASON = "the host stands in for one GPU per rank (on CPU)"


class Stream:
    """A stream on which everything has already happened when the call returns."""

    cuda_stream = 0
    device = HOST
    device_index = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class Event:
    """A mark on the wall clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return (end._time - self._time) * 1e3


def resident_bytes(*_: Any) -> int:
    """Resident memory of this process now, bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def peak_bytes(*_: Any) -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _MemoryStats(dict):
    def __missing__(self, key: str) -> int:
        return peak_bytes() if "peak" in key else resident_bytes()


class _HostProperties:
    name = "cpu"
    gcnArchName = uuid = "cpu"  # noqa: N815 - torch's own name
    major = minor = 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _null_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _names() -> dict[str, Any]:
    stream = Stream()
    generator = torch.default_generator
    return {
        # Identity.
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,  # an int: callers index default_generators with it
        "set_device": _nothing,
        "get_device_name": lambda *_: "cpu",
        "get_device_capability": lambda *_: (0, 0),
        "get_device_properties": lambda *_: _HostProperties,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": _nothing,
        "init": _nothing,
        "device": _null_context,
        # Order of execution.
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "stream": _null_context,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": _nothing,
        "synchronize": _nothing,
        "is_current_stream_capturing": lambda: False,
        "_sleep": _nothing,
        # Random state: the device generator is the CPU generator.
        "manual_seed": lambda seed: generator.manual_seed(seed),
        "manual_seed_all": lambda seed: generator.manual_seed(seed),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state.cpu()),
        "default_generators": (generator,),
        # Memory.
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "memory_allocated": resident_bytes,
        "memory_reserved": resident_bytes,
        "max_memory_allocated": peak_bytes,
        "max_memory_reserved": peak_bytes,
        "reset_peak_memory_stats": _nothing,
        "memory_stats": lambda *_: _MemoryStats(),
        "mem_get_info": lambda *_: (_HostProperties.total_memory - resident_bytes(), _HostProperties.total_memory),
        "device_memory_used": resident_bytes,
    }


def _wrap_distinct(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A new function object around `fn` (see `replacements._distinct`, which leaves closures alone)."""
    return lambda *args, **kwargs: fn(*args, **kwargs)


def install() -> None:
    """Replace the names of `torch.cuda` that Megatron uses."""
    for name, value in _names().items():
        replace(torch.cuda, name, value if isinstance(value, type | tuple) else _wrap_distinct(value), REASON)
    replace(torch.cuda.nvtx, "range_push", _nothing, "no profiler ranges (on CPU)")
    replace(torch.cuda.nvtx, "range_pop", _nothing, "no profiler ranges (on CPU)")
    for name in ("get_rng_state", "set_rng_state"):
        replace(torch.cuda.random, name, getattr(torch.cuda, name), REASON)
