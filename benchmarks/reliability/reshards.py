"""Save on one layout and go on on another: within rounding, or refused in seconds with words that help."""

import shutil
from typing import Any

from benchmarks.reliability import content
from benchmarks.reliability.jobs import Ended
from benchmarks.reliability.tiny import DATA, MODEL, PRETRAIN, TRAIN, Tiny

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
OPTIMIZER = ["--use-distributed-optimizer"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "DP2": (2, []),
    "DP2, optimizer": (2, OPTIMIZER),
    "TP2 PP2": (4, [*TP2, *PP2]),
    "TP2 DP2 SP, optimizer": (4, [*TP2, "--sequence-parallel", *OPTIMIZER]),
    "PP2 DP2, optimizer": (4, [*PP2, *OPTIMIZER]),
}
TOLERANCE = 1e-5  # relative, of losses and norms of gradients
SECONDS = 20.0  # in which a refusal has to come
EXACT = ("step", "tokens", "learning_rate", "batch_size")
CLOSE = ("loss", "grad_norm")
NAMES = list(LAYOUTS)


def run(tiny: Tiny, name: str) -> dict[str, Any]:
    """Train two steps on a layout, and two more on each."""
    saved = f"reshard-{NAMES.index(name)}"
    done = _train(tiny, name, saved, "2")
    if done.status:
        raise SystemExit(done.said[-3000:])
    straight = f"{saved}-straight"
    _check(_train(tiny, name, straight, "4"))
    expected = content.metrics(tiny.path / straight / "metrics.jsonl")
    cells = {}
    for other in NAMES:
        again = f"{saved}-{NAMES.index(other)}"
        tiny.copy(saved, again)
        done = _train(tiny, other, again, "4")
        cells[other] = _cell(done) if done.status else _compared(tiny, again, expected)
        shutil.rmtree(tiny.path / again)
    return {"cells": cells}


def _train(tiny: Tiny, layout: str, save: str, steps: str) -> Ended:
    ranks, flags = LAYOUTS[layout]
    begins = [] if (tiny.path / save).exists() else ["--pretrained-checkpoint", "teacher"]
    command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--save-interval", "2", "--train-iters", steps, *flags, *begins]
    return tiny.server.run([*command, "--load", save, "--save", save], tiny.path, ranks)


def _check(done: Ended) -> None:
    if done.status:
        raise SystemExit(done.said[-3000:])


def _cell(done: Ended) -> dict[str, Any]:
    """What was refused: with status 2, an error and what is legal, in time; everything else has failed."""
    told = [line for line in done.err.splitlines() if line.startswith(("error", "  legal:"))]
    good = done.status == 2 and len(told) >= 2 and "Traceback" not in done.said and done.seconds < SECONDS
    message = told[0] if good else f"status {done.status}: {done.said[-1500:]}"
    return {"outcome": "refused" if good else "failed", "message": message, "seconds": done.seconds}


def _compared(tiny: Tiny, run: str, expected: list[dict[str, float]]) -> dict[str, Any]:
    found = content.metrics(tiny.path / run / "metrics.jsonl")
    if len(found) != len(expected) or any(
        ours[key] != theirs[key] for ours, theirs in zip(found, expected, strict=True) for key in EXACT
    ):
        return {"outcome": "failed", "message": f"other steps: {found} and {expected}"}
    largest = max(
        abs(ours[key] - theirs[key]) / abs(theirs[key])
        for ours, theirs in zip(found, expected, strict=True)
        for key in CLOSE
    )
    return {"outcome": "goes on" if largest <= TOLERANCE else "failed", "difference": largest}
