"""Runs a program, and notes what memory and how many open files it holds: `watched.py OUT PROGRAM FLAGS`.

From outside of the program, by the lines of its `metrics.jsonl`; bytes are those that are left when free ones have been
given back to the system.
"""

import ctypes
import gc
import json
import os
import runpy
import sys
import threading
from pathlib import Path

import psutil

EVERY = 0.25  # seconds


def watch(metrics: Path, samples: list[dict[str, int]], end: threading.Event) -> None:
    """Take a sample now and then, one for each step at most."""
    process = psutil.Process()
    trim = ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else lambda _: None
    while not end.wait(EVERY):
        step = metrics.read_text().count("\n") if metrics.exists() else 0
        if step and (not samples or samples[-1]["step"] < step):
            gc.collect()
            trim(0)
            rss = process.memory_info().rss
            samples.append({"step": step, "rss": rss, "descriptors": len(os.listdir("/proc/self/fd"))})


def main() -> None:
    out, program = Path(sys.argv[1]), sys.argv[2]
    del sys.argv[:2]
    metrics = Path(sys.argv[sys.argv.index("--save") + 1]) / "metrics.jsonl"
    samples: list[dict[str, int]] = []
    end = threading.Event()
    watcher = threading.Thread(target=watch, args=(metrics, samples, end), daemon=True)
    watcher.start()
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        end.set()
        watcher.join()
        out.write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
