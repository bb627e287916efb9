"""What every result says about where it was measured, and where it goes."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

from megatron_ext.training.directory import git_commit, versions


def describe() -> dict[str, Any]:
    """Date, processor, cores, load average, versions, and commit."""
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "date": date.today().isoformat(),
        "machine": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "commit": git_commit(),
    }


def write(report: dict[str, Any], name: str, text: str, folder: Path | None = None) -> None:
    """Print the text, and write `name`.json and `name`.md; beside the other results by default."""
    folder = folder or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)
