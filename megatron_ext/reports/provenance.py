"""What made a number: the machine, versions of Python and of packages, and the commit of the source."""

import importlib.metadata
import os
import platform as host
import subprocess
from pathlib import Path

COMMIT = "MEGATRON_EXT_COMMIT"
"""The environment variable with the commit, which an image without a checkout sets (docker/Dockerfile)."""
PACKAGES = ("megatron-ext", "megatron-core", "torch", "transformer-engine", "mamba-ssm", "causal-conv1d", "triton")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; those that are installed."""
    found = {"python": host.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """The system and the processor."""
    info, processor = Path("/proc/cpuinfo"), host.processor() or host.machine()
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return {"system": host.platform(), "processor": names[0].partition(":")[2].strip() if names else processor}


def git_commit() -> str | None:
    """The commit of the source tree this package runs from; without a checkout or git, `MEGATRON_EXT_COMMIT` says it.

    None if nothing does, and where the package is installed inside of a repository that it is no part of.
    """
    own = Path(__file__)
    command = ["git", "-C", str(own.parent), "rev-parse", "--verify", "--quiet", f"HEAD:./{own.name}"]
    try:
        is_part = subprocess.run(command, capture_output=True, check=False).returncode == 0
        done = subprocess.run([*command[:-1], "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return os.environ.get(COMMIT) or None
    return (is_part and done.stdout.strip()) or os.environ.get(COMMIT) or None
