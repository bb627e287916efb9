"""Something is wrong with one rank, or with the machine: the job ends soon and says why, or goes on."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reliability import content
from benchmarks.reliability.jobs import ROOT, Ended
from benchmarks.reliability.tiny import DATA, MODEL, PRETRAIN, TRAIN, Tiny
from megatron_ext.checkpoint import layout
from megatron_ext.errors import MegatronExtError

FAULTY = Path(__file__).with_name("faulty.py")
SECONDS = 15.0  # in which all ranks have ended
RANKS = {
    "rank 1 raises": ("raises", 1),
    "rank 0 raises": ("raises", 0),
    "rank 1 is killed": ("is killed", 1),
    "rank 0 is killed": ("is killed", 0),
    "rank 1 crashes": ("crashes", 1),
    "rank 1 raises while importing": ("raises while importing", 1),
    "rank 0 is killed while importing": ("is killed while importing", 0),
    "rank 1 hangs": ("hangs", 1),
    "rank 1 hangs while importing": ("hangs while importing", 1),
}
GRACE = 30.0  # seconds that torchrun gives a rank after SIGTERM
MINUTE = ["--distributed-timeout-minutes", "1"]
"""After which a rank that answers nothing is given up."""
ENDLESS = ["--train-iters", "100000", "--save-interval", "100000"]
TINY_DISK = 700_000  # bytes: less than two steps


def run(tiny: Tiny, name: str) -> dict[str, Any]:
    """One of them."""
    return _on_a_rank(tiny, name) if name in RANKS else OTHERS[name](tiny)


def _clear(tiny: Tiny, *names: str) -> None:
    for name in names:
        shutil.rmtree(tiny.path / name, ignore_errors=True)
        (tiny.path / name).unlink(missing_ok=True)


def _start(tiny: Tiny, *words: str | Path, ranks: int = 1, environment: Mapping[str, str] | None = None) -> Ended:
    """A job as a user starts it; it and all that it has started are gone afterwards."""
    command = [
        sys.executable,
        *(["-m", "megatron_ext", "torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else []),
    ]
    command += ["--standalone"] if ranks > 1 else []
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "MEGATRON_EXT_DEVICE": "cpu"}
    _clear(tiny, "fault")
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen(
            [*command, *map(str, words)], cwd=tiny.path, env={**os.environ, **ours, **(environment or {})},
            stdout=output, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            status = job.wait(300)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        ended = time.time()
        seconds = time.perf_counter() - begun
        _end_group(job.pid)
        output.seek(0)
        errors.seek(0)
        done = Ended(status, output.read(), errors.read(), seconds)
    fault = tiny.path / "fault"
    if fault.exists():
        done.seconds = ended - float(fault.read_text())
    return done


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _on_a_rank(tiny: Tiny, name: str) -> dict[str, Any]:
    fault, rank = RANKS[name]
    hangs = "hangs" in fault
    save = "faulty"
    _clear(tiny, save, "fault")
    flags = [*MODEL, *DATA, *TRAIN, *ENDLESS, "--save", save, *(MINUTE if hangs else [])]
    done = _start(tiny, FAULTY, fault, str(rank), PRETRAIN, *flags, ranks=2)
    lines = [line for line in done.err.splitlines() if line.strip()]
    last = next((line for line in lines[-3:] if line.startswith("error: ")), "")
    # Rank 0 speaks for all where it has words of its own; of any other the number is told. Nobody knows who hangs.
    readable = last.startswith(f"error: rank {rank}") or (rank == 0 and "on purpose" in last)
    readable |= hangs and ("Timed out" in last or "timeout" in last)
    allowed = SECONDS + (60 + GRACE if hangs else 0)
    return _row(0 < done.status < 200 and done.seconds < allowed and readable, done, allowed=allowed, line=last)


def _row(good: bool, done: Ended, **more: Any) -> dict[str, Any]:
    said = {} if good else {"message": f"status {done.status}: {done.said[-2500:]}"}
    return {"good": good, "status": done.status, "seconds": done.seconds, **more, **said}


def _errors(done: Ended) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error")]


def _accepted(path: Path) -> bool:
    """Whether what is accepted in a run directory can be read, every byte."""
    try:
        content.step(layout.find(path).path)
    except MegatronExtError:
        return True
    except Exception:
        return False
    return True


def _disk_full_on_one_rank(tiny: Tiny) -> dict[str, Any]:
    """Its files stop growing; another rank's disk has room. Afterwards, with room, the run goes on."""
    save = "full-one"
    _clear(tiny, save, "fault")
    command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "6", "--load", save, "--save", save]
    done = _start(tiny, FAULTY, "disk full", "1", *command, ranks=2)
    told, whole = _errors(done), _accepted(tiny.path / save)
    again = tiny.server.run(command, tiny.path, 2)
    good = 0 < done.status < 200 and done.seconds < SECONDS and bool(told) and whole and again.status == 0
    return _row(good, done, line=told[-1] if told else "", goes_on=again.status == 0, lines=len(done.err.splitlines()))


@contextmanager
def _small_disk(place: Path, size: int) -> Iterator[bool]:
    """A file system with so much room, where this process may mount one."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=True)


def _disk_full(tiny: Tiny) -> dict[str, Any]:
    with _small_disk(tiny.path / "small-disk", TINY_DISK) as mounted:
        if not mounted:
            return {"good": None, "message": "no file system can be mounted here"}
        save = "small-disk/run"
        command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "4", "--load", save, "--save", save]
        done = tiny.server.run(command, tiny.path)
        told, whole = _errors(done), _accepted(tiny.path / save)
    return _row(0 < done.status < 200 and bool(told) and whole, done, line=told[-1] if told else "")


def _trains(tiny: Tiny, name: str, **environment: str) -> dict[str, Any]:
    """A start in another environment trains, to the same losses as in this one."""
    _clear(tiny, name)
    command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "3", "--save", name]
    done = _start(tiny, *command, environment=environment)
    same = done.status == 0 and _same_as_teacher(tiny, name)
    return _row(same, done)


def _same_as_teacher(tiny: Tiny, name: str) -> bool:
    return content.run(tiny.path / name) == content.run(tiny.path / "teacher")


def _temporary_full(tiny: Tiny) -> dict[str, Any]:
    with _small_disk(tiny.path / "small-disk", 4096) as mounted:
        if not mounted:
            return {"good": None, "message": "no file system can be mounted here"}
        with (tiny.path / "small-disk" / "full").open("wb", buffering=0) as file:
            for _ in range(4):
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        return _trains(tiny, "full-tmp", TMPDIR=str(tiny.path / "small-disk"))


def _clock(tiny: Tiny) -> dict[str, Any]:
    name = "clock"
    _clear(tiny, name)
    command = [FAULTY, "clock", "0", PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "3", "--save", name]
    done = tiny.server.run(command, tiny.path)
    return _row(done.status == 0 and _same_as_teacher(tiny, name), done)


def _two_jobs(tiny: Tiny) -> dict[str, Any]:
    """Started at once with one `--save`: one works, the other says who does."""
    name = "two-jobs"
    _clear(tiny, name)
    command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "3", "--load", name, "--save", name]
    jobs = [tiny.server.start(command, tiny.path) for _ in range(2)]
    ended = sorted((job.wait() for job in jobs), key=lambda done: done.status)
    told = "another job writes there" in ended[1].err
    good = [done.status for done in ended] == [0, 2] and told and _same_as_teacher(tiny, name)
    if not good:
        return {"good": False, "message": "\n".join(done.said[-1500:] for done in ended)}
    return {"good": True, "line": _errors(ended[1])[0]}


def _nowhere(tiny: Tiny) -> dict[str, Any]:
    save = "/proc/nowhere"
    done = tiny.server.run([PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "3", "--save", save], tiny.path)
    told = _errors(done)
    return _row(done.status == 2 and len(told) == 1 and save in done.err, done, line=told[0] if told else "")


OTHERS: dict[str, Callable[[Tiny], dict[str, Any]]] = {
    "disk full on rank 1": _disk_full_on_one_rank,
    "disk full": _disk_full,
    "no git": lambda tiny: _trains(tiny, "no-git", PATH="/nowhere"),
    "a home that cannot be written": lambda tiny: _trains(tiny, "no-home", HOME="/proc/nowhere"),
    "TMPDIR full": _temporary_full,
    "TMPDIR cannot be written": lambda tiny: _trains(tiny, "no-tmp", TMPDIR="/proc/nowhere"),
    "a clock that goes back an hour": _clock,
    "two jobs with one --save": _two_jobs,
    "--save cannot be written": _nowhere,
}
NAMES = [*RANKS, *OTHERS]
