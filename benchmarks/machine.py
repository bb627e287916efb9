"""What every result says about where it was measured, and where it goes."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from megatron_ext.reports.provenance import git_commit, versions


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


def peak_memory() -> int:
    """The most memory this process has held so far, bytes; getrusage's would include the parent's, from the fork."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def copy(source: str | Path, destination: str | Path) -> None:
    """What writing a checkpoint is measured against: `cp` to the disk."""
    subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(destination)], check=True)


def in_new_process(script: str, *arguments: str | Path) -> list[Any]:
    """What `script --child ARGUMENTS` prints as JSON."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def torchrun(processes: int, *command: str) -> None:
    """Run a program on so many processes of one thread; if it fails, end this one with the last of what it said."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*start, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-12000:])


def sized_arguments(
    parser: argparse.ArgumentParser, sizes: Mapping[str, int], quick: Mapping[str, int]
) -> argparse.Namespace:
    """Parse the command line with a flag for each size, and `--quick`, which makes other values the defaults."""
    for name in sizes:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--quick", action="store_true", help="whether it runs at all; the report goes into --out")
    arguments = parser.parse_args()
    for name, size in (quick if arguments.quick else sizes).items():
        field = name.replace("-", "_")
        setattr(arguments, field, getattr(arguments, field) or size)
    return arguments


def write(report: dict[str, Any], name: str, text: str, folder: Path | None = None) -> None:
    """Print the text, and write `name`.json and `name`.md; beside the other results by default."""
    folder = folder or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)
