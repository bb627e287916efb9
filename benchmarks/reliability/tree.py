"""A directory while a job writes it: what lies there at a moment, and when that changes."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.reliability.content import LOCK
from benchmarks.reliability.jobs import Job

POLL = 0.001  # seconds


def listing(places: Iterable[Path]) -> dict[str, int]:
    """Sizes of all files and directories in some places, hidden ones too, and of what begins with a place's name."""
    found: dict[str, int] = {}
    for place in places:
        for name in _names(place.parent):
            if (name == place.name or f".{place.name}." in name) and not name.endswith(LOCK):
                _add(place.parent / name, found)
    return found


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _add(path: Path, found: dict[str, int]) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    is_folder = (status.st_mode & 0o170000) == 0o040000
    found[str(path)] = -1 if is_folder else status.st_size
    if is_folder:
        try:
            names = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            if name != LOCK:
                _add(path / name, found)


def changes(job: Job, places: list[Path]) -> list[float]:
    """Wait for a job's end; when its output changed, in seconds from its start."""
    before, times = listing(places), []
    while job.lives:
        now = listing(places)
        if now != before:
            times.append(time.perf_counter() - job.begun)
            before = now
        time.sleep(POLL)
    return times


def wait_for_change(job: Job, places: list[Path], count: int) -> bool:
    """Wait until the output has changed so often; whether the job is still there."""
    before = listing(places)
    while count and job.lives:
        now = listing(places)
        if now != before:
            count -= 1
            before = now
        else:
            time.sleep(POLL)
    return job.lives
