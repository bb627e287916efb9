"""The reliability matrix: breaks every job and every file on purpose, and writes down what came of it.

    python -m benchmarks.reliability [--only PART[/CASE] ...] [--missing] [--small] [--workers 1] [--out DIR]

Kills, corruptions, resumes, reshards, payloads, memory and faults, each of some cases. A case's result goes into
DIR/reliability.json as soon as it is there, so that a matrix that was stopped goes on with --missing;
docs/reliability.md is written from that file. The whole takes less than an hour on two cores with --workers 2; --small
takes a few cases of some parts, in seconds.
"""

import argparse
import json
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.reliability import corruptions, faults, kills, memory, page, payloads, reshards, resumes
from benchmarks.reliability.jobs import Server
from benchmarks.reliability.tiny import Tiny, make

RESULTS = Path(__file__).parents[1] / "results"
Run = Callable[[Tiny, str], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part of the matrix: its cases, those of the small matrix, and how one is run."""

    cases: list[str]
    small: list[str]
    run: Run
    run_small: Run | None = None


def parts(kill: int, flips: int, seed: int) -> dict[str, Part]:
    """All of them.

    Args:
        kill: Kills of a category.
        flips: Flipped bits of a file.
        seed: Decides which moments and places; those of a job also depend on the machine.
    """
    groups = {str(number): payloads.NAMES[number::4] for number in range(4)}
    return {
        "kills": Part(
            list(kills.CATEGORIES), ["train", "data"], lambda tiny, case: kills.run(tiny, case, kill, seed),
            lambda tiny, case: kills.run(tiny, case, 2, seed),
        ),
        "corruptions": Part(
            corruptions.NAMES, ["checkpoint"], lambda tiny, case: corruptions.run(tiny, case, flips, seed),
            lambda tiny, case: corruptions.run(tiny, case, 1, seed, ("flip",)),
        ),
        "resumes": Part(resumes.NAMES, [], resumes.run),
        "reshards": Part(reshards.NAMES, [], reshards.run),
        "payloads": Part(
            list(groups), ["0"], lambda tiny, case: payloads.run(tiny, groups[case]),
            lambda tiny, case: payloads.run(tiny, ["config.yaml"]),
        ),
        "memory": Part(memory.NAMES, [], memory.run),
        "faults": Part(faults.NAMES, [], faults.run),
    }  # fmt: skip


class Results:
    """The file of results, in which each case is replaced alone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "reliability.json"
        self._lock = threading.Lock()
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"parts": {}}

    def has(self, part: str, case: str) -> bool:
        """Whether a case has a result."""
        return case in self.found["parts"].get(part, {})

    def add(self, part: str, case: str, result: dict[str, Any]) -> None:
        """Put a case's result in the place of its older one."""
        with self._lock:
            self.found |= {"what": "what was broken on purpose, and what came of it", **machine.describe()}
            self.found["parts"].setdefault(part, {})[case] = result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def main() -> int:
    """Run what was asked for; the exit status says whether all cases came to a result that is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART[/CASE]", help="these alone")
    parser.add_argument("--missing", action="store_true", help="those without a result alone")
    parser.add_argument("--small", action="store_true", help="a few cases, in seconds")
    parser.add_argument("--workers", type=int, default=1, help="how many cases at once; each takes about a core")
    parser.add_argument("--kills", type=int, default=200, help="of each category")
    parser.add_argument("--flips", type=int, default=5, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where reliability.json goes")
    asked = parser.parse_args()
    results, all_parts = Results(asked.out), parts(asked.kills, asked.flips, asked.seed)
    todo: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    count = 0
    for name, part in all_parts.items():
        for case in part.small if asked.small else part.cases:
            wanted = asked.only is None or name in asked.only or f"{name}/{case}" in asked.only
            if wanted and not (asked.missing and results.has(name, case)):
                todo.put((name, case))
                count += 1
    if not count:
        parser.error(f"no such case; parts and cases: { {name: part.cases for name, part in all_parts.items()} }")
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        workers = [
            threading.Thread(
                target=_work, args=(Path(folder) / str(number), todo, all_parts, results, asked.small, bad)
            )
            for number in range(min(asked.workers, count))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if asked.out == RESULTS:
        page.write(results.found)
    print("\n".join(["not as it should be:", *bad]) if bad else "all as it should be")
    return bool(bad)


def _work(
    folder: Path,
    todo: "queue.SimpleQueue[tuple[str, str]]",
    all_parts: dict[str, Part],
    results: Results,
    small: bool,
    bad: list[str],
) -> None:
    """Take one case after another, in a folder and with a server of its own."""
    with ExitStack() as stack:
        tiny = make(folder, stack.enter_context(Server()), small)
        while True:
            try:
                name, case = todo.get_nowait()
            except queue.Empty:
                return
            part, begun = all_parts[name], time.perf_counter()
            try:
                result = (part.run_small if small and part.run_small else part.run)(tiny, case)
            except (Exception, SystemExit):
                print(f"{name}/{case}: {traceback.format_exc()}", flush=True)
                bad.append(f"{name}/{case}")
                continue
            took = time.perf_counter() - begun
            results.add(name, case, result | {"took": round(took, 1), "on": date.today().isoformat()})
            verdict = page.verdict(name, result)
            if verdict != page.GOOD:
                bad.append(f"{name}/{case}: {verdict}")
            print(f"{name}/{case}: {verdict} ({took:.0f} s; {todo.qsize()} to go)", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
