"""Runs a program in which something goes wrong on one rank: `faulty.py FAULT RANK PROGRAM FLAGS`.

It goes wrong at once if the fault says so, or when the run's second step is done. A file `fault` then has the time.
"""

import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOM = 200_000  # bytes that a file may have once the disk is full


def _note() -> None:
    Path("fault").write_text(str(time.time()))


def _raise() -> None:
    raise RuntimeError("this rank has failed on purpose")


def _hang() -> None:
    time.sleep(1e6)


def _fill() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))


def _kill(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


AT_ONCE: dict[str, Callable[[], None]] = {
    "raises while importing": _raise,
    "hangs while importing": _hang,
    "is killed while importing": _kill(signal.SIGKILL),
}
LATER: dict[str, Callable[[], None]] = {
    "raises": _raise,
    "is killed": _kill(signal.SIGKILL),
    "crashes": _kill(signal.SIGSEGV),
    "hangs": _hang,
    "disk full": _fill,
}


def clock_goes_back() -> None:
    """An hour, ten seconds after now."""
    real, begun = time.time, time.monotonic()
    time.time = lambda: real() - (3600 if time.monotonic() - begun > 1 else 0)


def after_two_steps(metrics: Path, fault: Callable[[], None]) -> None:
    """Let it happen in the main thread, wherever that is."""

    def happen(number: int, frame: FrameType | None) -> None:
        _note()
        fault()

    def watch() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGALRM)

    signal.signal(signal.SIGALRM, happen)
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    fault, rank, program = sys.argv[1:4]
    del sys.argv[:3]
    sys.path.insert(0, str(Path(program).parent))
    if fault == "clock":
        clock_goes_back()
    elif os.environ.get("RANK", "0") == rank:
        if fault in AT_ONCE:
            _note()
            AT_ONCE[fault]()
        else:
            after_two_steps(Path(sys.argv[sys.argv.index("--save") + 1]) / "metrics.jsonl", LATER[fault])
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
