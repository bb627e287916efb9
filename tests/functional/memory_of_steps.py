"""`distill_gpt.py`, which also writes the memory that the process holds after each step into memory.json, bytes."""

import json
import sys
from pathlib import Path

import psutil

import distill_gpt
from megatron_ext.training.launch import main
from megatron_ext.training.log import MetricsLog

held: list[int] = []
write = MetricsLog._write


def write_and_measure(log: MetricsLog) -> None:
    """At the end of each step."""
    write(log)
    held.append(psutil.Process().memory_info().rss)


MetricsLog._write = write_and_measure
status = main(distill_gpt.run)
Path("memory.json").write_text(json.dumps(held))
sys.exit(status)
