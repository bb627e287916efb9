"""300 steps: what a process holds stays what it is, and so do its open files."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.reliability import resumes
from benchmarks.reliability.tiny import DATA, DISTILL, MODEL, PRETRAIN, TRAIN, Tiny

STEPS = 300
WATCHED = Path(__file__).with_name("watched.py")
CASES = {
    "train": ("training", [PRETRAIN]),
    "distill": ("distillation from a live teacher", [DISTILL, "--distill-teacher", "teacher"]),
    "cache": ("distillation from a cache", [DISTILL, *resumes.ROWS["cache"].flags]),
}
NAMES = list(CASES)


def run(tiny: Tiny, name: str, steps: int = STEPS) -> dict[str, Any]:
    """Train so many steps, with a save and a validation in each tenth of them; growth from the first third to the end.

    Of each third of the measurements the median counts: what is freed is not given back at once.
    """
    what, command = CASES[name]
    if name == "cache" and not (tiny.path / "resume-cache").exists():
        tiny.server.check(resumes.CACHE, tiny.path)
    save = f"memory-{name}"
    shutil.rmtree(tiny.path / save, ignore_errors=True)
    often = ["--save-interval", str(steps // 10), "--eval-interval", str(steps // 10), "--save-retain-interval"]
    flags = [*MODEL, *DATA, *TRAIN, *command[1:], "--train-iters", str(steps), *often, str(steps), "--save", save]
    out = tiny.path / f"{save}.json"
    tiny.server.check([WATCHED, out, command[0], *flags], tiny.path)
    held = [sample for sample in json.loads(out.read_text()) if sample["step"] > steps // 10]
    third = len(held) // 3
    early, late = held[:third], held[-third:]
    bytes_ = [statistics.median(sample["rss"] for sample in part) for part in (early, late)]
    files = [statistics.median(sample["descriptors"] for sample in part) for part in (early, late)]
    return {
        "what": what,
        "steps": held[-1]["step"],
        "samples": len(held),
        "bytes": bytes_[0],
        "growth": bytes_[1] / bytes_[0] - 1,
        "descriptors": files[0],
        "more descriptors": files[1] - files[0],
    }
