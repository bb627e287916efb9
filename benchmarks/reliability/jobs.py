"""Jobs that start at once and can be killed: forks of one process that has imported torch, Megatron and the rest.

`Server.start([script, *flags], cwd, ranks=2)` is `torchrun --nproc-per-node 2 script *flags` in all that a program can
see. Each rank is a session of its own, so that a kill reaches what it has started, too.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import fork_server

ROOT = Path(__file__).parents[2]
CONSOLE = ROOT / "megatron_ext" / "__main__.py"
"""What `megatron-ext` runs."""
PATIENCE = 600.0  # seconds in which every job here ends by itself
ENDS_OTHERS = 15.0  # seconds that the other ranks are given once one has failed


@dataclass
class Ended:
    """What a job that has ended leaves: its exit status (-9 after SIGKILL), what it said, and how long it took."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """All of it, without where the checkout lies."""
        return (self.out + self.err).replace(f"{ROOT}{os.sep}", "")


@dataclass
class Job:
    """A job that has been started."""

    server: "Server"
    pids: list[int]
    outputs: list[Path]
    begun: float = field(default_factory=time.perf_counter)

    @property
    def lives(self) -> bool:
        """Whether any rank still works."""
        return any(_state(pid) not in ("Z", "") for pid in self.pids)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL to some ranks and all that they have started; to all by default."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            for kill in (os.kill, os.killpg):  # it may not have become the leader of its group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pids[rank], signal.SIGKILL)

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Wait until it ends, which it is made to when its time is over or one of its ranks has failed."""
        status = self.server._ask({"wait": self.pids, "patience": patience})
        seconds = time.perf_counter() - self.begun
        self.kill()
        out, err = (path.read_text(errors="replace") for path in self.outputs)
        for path in self.outputs:
            path.unlink()
        return Ended(status, out, err, seconds)


class Server:
    """The process whose forks the jobs are; ends with the block."""

    def __init__(self) -> None:
        environment = fork_server.servers_environment()
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        command = [sys.executable, "-m", "benchmarks.reliability.jobs"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit("the server of jobs has not started")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input
        self._folder.cleanup()

    def start(
        self, command: Sequence[str | Path], cwd: Path, ranks: int = 1, environment: Mapping[str, str] | None = None
    ) -> Job:
        """Start a Python script on so many ranks."""
        self._count += 1
        outputs = [Path(self._folder.name) / f"{self._count}.{name}" for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()  # a job may be killed before it opens them
        begun = time.perf_counter()
        request = {"command": [str(word) for word in command], "outputs": [str(path) for path in outputs]}
        request |= {"cwd": str(cwd), "environments": fork_server.environments(ranks, environment or {})}
        return Job(self, self._ask(request), outputs, begun)

    def run(
        self, command: Sequence[str | Path], cwd: Path, ranks: int = 1, environment: Mapping[str, str] | None = None
    ) -> Ended:
        """Start it and wait."""
        return self.start(command, cwd, ranks, environment).wait()

    def check(self, command: Sequence[str | Path], cwd: Path, ranks: int = 1) -> Ended:
        """The same for what must succeed; ends the matrix if it does not."""
        done = self.run(command, cwd, ranks)
        if done.status:
            raise SystemExit(f"status {done.status}: {' '.join(map(str, command))}\n{done.said[-6000:]}")
        return done

    def _ask(self, request: dict[str, Any]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())


def _state(pid: int) -> str:
    """A letter as `ps` has it; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _serve() -> None:
    """Answer each request, a line of JSON; forks return from here and run their program."""
    fork_server.get_ready()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(_wait(request["wait"], request["patience"]), flush=True)
            continue
        pids = []
        for environment in request["environments"]:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                fork_server.become(request, environment, ROOT)
                return
            pids.append(pid)
        print(json.dumps(pids), flush=True)


def _wait(pids: list[int], patience: float) -> int:
    """The status of the first rank that fails, which ends the others; 0 if none does. None outlives its time."""
    left, failed = set(pids), 0
    end = time.monotonic() + patience
    while left:
        for pid in sorted(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            left.remove(pid)
            if status and not failed:
                failed, end = os.waitstatus_to_exitcode(status), min(end, time.monotonic() + ENDS_OTHERS)
                _signal(left, signal.SIGTERM)
        if time.monotonic() > end:
            failed = failed or -signal.SIGKILL
            _signal(left, signal.SIGKILL)
            end += PATIENCE
        time.sleep(0.003)
    return failed


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    _serve()
