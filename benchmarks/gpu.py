"""Every figure of a GPU in one run: stages in order, each with a deadline, and what they found after each of them.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--stages ceilings kernels ...] [--full] [--set ssm='--sizes full']
    python benchmarks/gpu.py --merge DIR/gpu.json

A stage is a benchmark of this folder or a set of tests, in a process of its own, that writes results into a folder;
one that does not end in time is stopped, and the next begins. DIR/gpu.json holds the results as files by name, with how
each stage ended, and is written anew after each stage; DIR/gpu.log holds what the stages said. `--merge` puts the
results into benchmarks/results and makes the page. Without `--full` rounds and repeats are those of nine minutes. Peers
are found on the PYTHONPATH (`peers.py`); Triton's cache, TRITON_CACHE_DIR, shortens a second run.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
TESTS = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Stage:
    """One thing to run.

    Attributes:
        name: What it is called.
        seconds: How long it may take.
        command: Program and arguments; `OUT` becomes the folder of results.
        quick: Arguments of a run of nine minutes, without which it is an unhurried one.
    """

    name: str
    seconds: int
    command: Sequence[str]
    quick: Sequence[str] = ()


def benchmark(name: str, seconds: int, script: str, quick: str = "") -> Stage:
    """A script of this folder that takes `--out`."""
    return Stage(name, seconds, [sys.executable, str(HERE / script), "--out", "OUT"], quick.split())


def marked_tests(name: str, seconds: int, *paths: str, processes: int = 0) -> Stage:
    """Tests marked `gpu` or `triton`."""
    marked = ["-n", str(processes), "-m", "gpu or triton", f"--junitxml=OUT/{name}.xml"]
    return Stage(name, seconds, [*TESTS, *marked, *(str(ROOT / path) for path in paths)])


STAGES = {
    stage.name: stage
    for stage in (
        benchmark("ceilings", 20, "gpu_ceilings.py"),
        Stage("compile", 90, [sys.executable, str(HERE / "precompile.py"), "--sizes", "full", "tp8", "context"]),
        marked_tests(
            "kernels", 120, "tests/unit/ops", "tests/unit/lm_head", processes=max(1, (os.cpu_count() or 2) // 2)
        ),
        benchmark("ssm", 130, "ssm_gpu.py"),
        benchmark("pretrain", 150, "pretrain.py", quick="--rounds 1 --steps 5"),
        benchmark("decode", 90, "decode.py", quick="--rounds 1 --contexts 4096 32768 131072"),
        benchmark("distillation", 45, "kd_loss.py"),
        benchmark("memory", 60, "memory.py"),
        benchmark("calibration", 30, "calibration.py"),
        benchmark("vision", 60, "vision_speed.py", quick="--rounds 3"),
        marked_tests("product", 120, "tests/functional/test_gpu.py"),
    )
}


def run(stage: Stage, seconds: float, full: bool, out: Path, log: Path) -> dict[str, Any]:
    """Run a stage; how it ended, and after how long."""
    command = [word.replace("OUT", str(out)) if word.startswith("OUT") or "=OUT" in word else word
               for word in (*stage.command, *([] if full else stage.quick))]  # fmt: skip
    begun = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n")
        file.flush()
        environment = os.environ | {"TRITON_CACHE_AUTOTUNING": "1"}  # a later stage, or run, does not choose again
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        # Whatever it has started, too: a rank that lives on would disturb the next stage.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1)}


def files(folder: Path) -> dict[str, str]:
    """What the stages have written, by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def merge(report: Path) -> None:
    """Put the results of a run where those of single benchmarks are, and make the page."""
    for name, text in json.loads(report.read_text())["files"].items():
        if Path(name).suffix in (".json", ".md"):
            (HERE / "results" / Path(name).name).write_text(text)
    subprocess.run([sys.executable, str(HERE / "performance_page.py")], check=True)


def main() -> int:
    """Run the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--full", action="store_true", help="all rounds and repeats, and four times the deadlines")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="STAGE=ARGUMENTS",
        help="arguments of a stage in place of its quick ones",
    )
    parser.add_argument("--merge", type=Path, metavar="JSON", help="take over the results of a run, and run nothing")
    args = parser.parse_args()
    if args.merge:
        merge(args.merge)
        return 0
    if not args.out:
        parser.error("--out or --merge is needed")
    given = {name: words for name, _, words in (word.partition("=") for word in args.set)}
    if unknown := given.keys() - STAGES.keys():
        parser.error(f"--set: no stage {', '.join(unknown)}; stages are {', '.join(STAGES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {"stages": {}, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.stages:
            stage = replace(STAGES[name], quick=shlex.split(given[name])) if name in given else STAGES[name]
            left = end - time.monotonic()
            if left < 5:
                report["stages"][name] = {"ended": "not begun: no time was left"}
                continue
            limit = min(left, stage.seconds * (4 if args.full else 1))
            report["stages"][name] = run(stage, limit, args.full, Path(folder), args.out / "gpu.log")
            report["files"] = files(Path(folder))
            (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: {report['stages'][name]}", flush=True)
    return int(any(stage["ended"] != "status 0" for stage in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
