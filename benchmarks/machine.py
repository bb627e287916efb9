"""What every result says about where it was measured."""

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Date, processor, cores, load average, and versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "date": date.today().isoformat(),
        "machine": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
