"""`distill_gpt.py`, which also writes what memory the process holds after some steps into memory.json.

By step: bytes that are resident when free ones have been given back, and how many tensors there are.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import psutil
import torch

from megatron_ext.cli import main
from megatron_ext.reports.metrics_log import MetricsLog

STEPS = (20, 60, 100, 120)
held: dict[int, tuple[int, int]] = {}
write = MetricsLog._write


def write_and_measure(log: MetricsLog) -> None:
    """At the end of each step."""
    step = int(log._record.get("step", 0))
    write(log)
    if step in STEPS:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        held[step] = psutil.Process().memory_info().rss, tensors


MetricsLog._write = write_and_measure
status = main(["distill", *sys.argv[1:]])
Path("memory.json").write_text(json.dumps(held))
sys.exit(status)
