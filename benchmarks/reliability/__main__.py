"""The reliability matrix: breaks every job and every file on purpose, and writes down what came of it.

    python -m benchmarks.reliability [--only PART[/CASE] ...] [--missing] [--small] [--workers 1] [--out DIR]

Kills, corruptions, resumes, reshards, payloads, memory and faults, each of some cases. A case's result goes into
DIR/reliability.json as soon as it is there, so that a matrix that was stopped goes on with --missing;
kills are added up in rounds. docs/reliability.md is written from that file. --small takes a few cases of some parts.
"""

import argparse
import contextlib
import json
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.reliability import corruptions, faults, kills, memory, page, payloads, reshards, resumes
from benchmarks.reliability.jobs import Server
from benchmarks.reliability.tiny import Tiny, make

RESULTS = Path(__file__).parents[1] / "results"
Result = dict[str, Any]
Run = Callable[[Tiny, str, Result | None], Result]
"""Takes the folder, the case, and what it has come to so far, if that is to be added to."""


@dataclass(frozen=True)
class Part:
    """A part of the matrix: its cases, those of the small matrix, how one is run, and how many kills it has."""

    cases: list[str]
    small: list[str]
    run: Run
    run_small: Run | None = None
    kills: int = 0

    @property
    def rounds(self) -> int:
        """In how many each case is run; kills are added up."""
        return max(1, ceil(self.kills / kills.ROUND))

    def is_complete(self, found: Result | None) -> bool:
        """Whether a case has come to its result."""
        return found is not None and found.get("kills", 0) >= self.kills


def parts(kill: int, flips: int, seed: int) -> dict[str, Part]:
    """All of them.

    Args:
        kill: Kills of a category.
        flips: Flipped bits of a file.
        seed: Decides which moments and places; those of a job also depend on the machine.
    """

    def some_kills(tiny: Tiny, case: str, before: Result | None) -> Result:
        left = kill - (before["kills"] if before else 0)
        return kills.run(tiny, case, min(kills.ROUND, left), seed, before)

    groups = {str(number): payloads.NAMES[number::4] for number in range(4)}
    return {
        "kills": Part(
            list(kills.CATEGORIES), ["train", "data"], some_kills, lambda tiny, case, _: kills.run(tiny, case, 2, seed),
            kills=kill,
        ),
        "corruptions": Part(
            corruptions.NAMES, ["checkpoint"], lambda tiny, case, _: corruptions.run(tiny, case, flips, seed),
            lambda tiny, case, _: corruptions.run(tiny, case, 1, seed, ("flip",)),
        ),
        "resumes": Part(resumes.NAMES, [], lambda tiny, case, _: resumes.run(tiny, case)),
        "reshards": Part(reshards.NAMES, [], lambda tiny, case, _: reshards.run(tiny, case)),
        "payloads": Part(
            list(groups), ["0"], lambda tiny, case, _: payloads.run(tiny, groups[case]),
            lambda tiny, case, _: payloads.run(tiny, ["config.yaml"]),
        ),
        "memory": Part(memory.NAMES, [], lambda tiny, case, _: memory.run(tiny, case)),
        "faults": Part(faults.NAMES, [], lambda tiny, case, _: faults.run(tiny, case)),
    }  # fmt: skip


class Results:
    """The file of results, in which each case is replaced alone, or added to.

    Args:
        folder: Where it lies.
        goes_on: Whether kills are added to those of an earlier matrix.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.path = folder / "reliability.json"
        self._lock = threading.Lock()
        self._goes_on, self._own = goes_on, set[tuple[str, str]]()
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"parts": {}}

    def so_far(self, part: str, case: str) -> Result | None:
        """What a case has come to, if that counts."""
        counts = self._goes_on or (part, case) in self._own
        return self.found["parts"].get(part, {}).get(case) if counts else None

    def add(self, part: str, case: str, result: Result) -> None:
        """Put a case's result in the place of its older one."""
        with self._lock:
            self._own.add((part, case))
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
    results, all_parts = Results(asked.out, asked.missing), parts(asked.kills, asked.flips, asked.seed)
    todo: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    count = 0
    for number in range(max(part.rounds for part in all_parts.values())):
        for name, part in all_parts.items():
            for case in (part.small if asked.small else part.cases) if number < part.rounds else []:
                wanted = asked.only is None or name in asked.only or f"{name}/{case}" in asked.only
                if wanted and not part.is_complete(results.so_far(name, case)):
                    todo.put((name, case))
                    count += 1
        if asked.small:
            break
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
    """Take one case after another, in a folder and with a server of its own; what fails is bad, and nothing is lost."""
    try:
        with Server() as server:
            tiny = make(folder, server, small)
            with contextlib.suppress(queue.Empty):
                while True:
                    _run_case(tiny, *todo.get_nowait(), all_parts, results, small, bad)
    except (Exception, SystemExit):  # which would end a thread without a word
        print(traceback.format_exc(), flush=True)
        bad.append("a worker has ended early")


def _run_case(
    tiny: Tiny,
    name: str,
    case: str,
    all_parts: dict[str, Part],
    results: Results,
    small: bool,
    bad: list[str],
) -> None:
    part, begun, before = all_parts[name], time.perf_counter(), results.so_far(name, case)
    if part.kills and part.is_complete(before):
        return  # by earlier rounds
    try:
        result = (part.run_small if small and part.run_small else part.run)(tiny, case, before)
    except (Exception, SystemExit):
        print(f"{name}/{case}: {traceback.format_exc()}", flush=True)
        bad.append(f"{name}/{case}")
        return
    took = time.perf_counter() - begun
    in_all = took + (before["took"] if before else 0)
    results.add(name, case, result | {"took": round(in_all, 1), "on": date.today().isoformat()})
    verdict = page.verdict(name, result)
    if verdict != page.GOOD:
        bad.append(f"{name}/{case}: {verdict}")
    print(f"{name}/{case}: {verdict} ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
