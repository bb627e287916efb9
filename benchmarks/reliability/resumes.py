"""Stop after half of the steps and go on: losses, gradients and every tensor as of a run that was never stopped."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability import content
from benchmarks.reliability.tiny import DATA, DISTILL, MODEL, PRETRAIN, TRAIN, Tiny

STEPS = 4
TEACHER = ["--distill-teacher", "teacher"]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
OPTIMIZER = ["--use-distributed-optimizer"]
EXPERTS = [
    "--hybrid-layer-pattern=ME*E", "--num-experts", "4", "--moe-ffn-hidden-size", "16", "--moe-router-topk", "2",
    "--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2",
]  # fmt: skip
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


@dataclass(frozen=True)
class Row:
    """A kind of training that is stopped.

    Attributes:
        what: In words.
        flags: What is special about it; later flags win.
        script: The program.
        ranks: On how many.
        before: Command lines whose output it needs, each by its output's name.
    """

    what: str
    flags: list[str] = field(default_factory=list)
    script: Path = PRETRAIN
    ranks: int = 1
    before: dict[str, list[str | Path]] = field(default_factory=dict)


CACHE: list[str | Path] = [
    DISTILL, *TEACHER, *DATA, "--data-path", "little/text_document", "--split", "80,20,0", "--seq-length", "32",
    "--micro-batch-size", "4", "--distill-top-k", "8", "--distill-cache-write", "resume-cache",
]  # fmt: skip
ROWS = {
    "plain": Row("one rank"),
    "bf16": Row("bf16", ["--bf16"]),
    "fp16": Row("fp16", ["--fp16", "--initial-loss-scale", "1024"]),
    "dropout": Row("dropout", DROPOUT),
    "dropout-recomputed": Row(
        "dropout, recomputed",
        [*DROPOUT, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "dropout-tp2": Row("dropout, TP2 and SP", [*DROPOUT, TP, "2", "--sequence-parallel"], ranks=2),
    "pp2": Row("PP2", [PP, "2"], ranks=2),
    "dp2-optimizer": Row("DP2, distributed optimizer", OPTIMIZER, ranks=2),
    "dp2-overlap": Row(
        "the same, gathering parameters while computing",
        [*OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"], ranks=2,
    ),
    "dp2-buckets": Row(
        "the same, in many buckets",
        [*OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1000"], ranks=2,
    ),
    "pp2-optimizer": Row("PP2, distributed optimizer", [PP, "2", *OPTIMIZER], ranks=2),
    "experts": Row("a mixture of experts", EXPERTS),
    "ramp-up": Row("batches that grow", ["--step-batch-size-schedule", "0:2 64:4 192:8"]),
    "kd": Row("distillation", TEACHER, DISTILL),
    "kd-dropout": Row("distillation with dropout", [*TEACHER, *DROPOUT], DISTILL),
    "states-pp2-dp2": Row(
        "distillation with states and projections, PP2 and DP2",
        [*TEACHER, "--hidden-size", "16", "--num-attention-heads", "2", "--mamba-num-heads", "4",
         "--mamba-head-dim", "8", "--distill-states", "embedding", "final", PP, "2"],
        DISTILL, ranks=4,
    ),
    "correct-first": Row(
        "a teacher that is corrected first", [*TEACHER, "--distill-correct-teacher", "first"], DISTILL
    ),
    "correct-together": Row(
        "a teacher that is corrected meanwhile", [*TEACHER, "--distill-correct-teacher", "together"], DISTILL
    ),
    "cache": Row(
        "a cache of the teacher",
        ["--distill-cache", "resume-cache", "--data-path", "little/text_document", "--split", "80,20,0"],
        DISTILL, before={"resume-cache": CACHE},
    ),
    "own-ranks": Row(
        "a teacher on ranks of its own", [*TEACHER, "--distill-teacher-ranks", "1"], DISTILL, ranks=2
    ),
}  # fmt: skip
BACK, WHAT_BACK = "back", "back to an earlier step (`--ckpt-step`)"
NAMES = [*ROWS, BACK]


def run(tiny: Tiny, name: str) -> dict[str, Any]:
    """Stop and go on; how much differs from the run that was not stopped."""
    if name == BACK:
        return _back(tiny)
    row = ROWS[name]
    for output, command in row.before.items():
        if not (tiny.path / output).exists():
            tiny.server.check(command, tiny.path)
    train = [*TRAIN, "--train-iters", str(STEPS), "--save-interval", "2"]
    if "--step-batch-size-schedule" in row.flags:  # in place of one size
        place = train.index("--global-batch-size")
        del train[place : place + 2]
    command = [row.script, *MODEL, *DATA, *train, *row.flags]
    runs = [f"resume-{name}-{kind}" for kind in ("straight", "stopped")]
    for run in runs:
        shutil.rmtree(tiny.path / run, ignore_errors=True)
        # The one that is stopped ends after two steps, and its second start goes on; the other knows nothing of that.
        for stop in ["--exit-interval", "2"], []:
            if run == runs[1] or not stop:
                done = tiny.server.run([*command, "--load", run, "--save", run, *stop], tiny.path, row.ranks)
                if done.status:
                    return {"what": row.what, "difference": None, "message": done.said[-3000:]}
    return {"what": row.what, **_difference(tiny, *runs, first=1)}


def _back(tiny: Tiny) -> dict[str, Any]:
    """Branch off from the second of three steps that are there."""
    what, name = WHAT_BACK, "resume-back"
    shutil.rmtree(tiny.path / name, ignore_errors=True)
    command = [PRETRAIN, *MODEL, *DATA, *TRAIN, "--train-iters", "3"]
    done = tiny.server.run([*command, "--load", "teacher", "--ckpt-step", "2", "--save", name], tiny.path)
    if done.status:
        return {"what": what, "difference": None, "message": done.said[-3000:]}
    return {"what": what, **_difference(tiny, "teacher", name, first=3)}


def _difference(tiny: Tiny, straight: str, resumed: str, first: int) -> dict[str, Any]:
    """The largest difference of any figure of any step, and how many tensors of the last one are not the same."""
    left, right = (
        [step for step in content.metrics(tiny.path / run / "metrics.jsonl") if step["step"] >= first]
        for run in (straight, resumed)
    )
    if first > 1:  # a directory counts the tokens of its own steps
        left, right = ([step | {"tokens": 0} for step in run] for run in (left, right))
    if [step.keys() for step in left] != [step.keys() for step in right]:
        return {"difference": None, "message": f"other steps or figures: {left} and {right}"}
    pairs = [(ours[key] or 0.0, theirs[key] or 0.0) for ours, theirs in zip(left, right, strict=True) for key in ours]
    halves = [_last_tensors(tiny.path / run) for run in (straight, resumed)]
    keys = halves[0].keys() | halves[1].keys()
    return {
        "steps": len(left),
        "figures": len(pairs),
        "difference": max(abs(ours - theirs) for ours, theirs in pairs),
        "tensors": len(keys),
        "other tensors": sum(halves[0].get(key) != halves[1].get(key) for key in keys),
    }


def _last_tensors(run: Path) -> dict[str, str]:
    """Of the last step of a run, and of its corrected teacher."""
    found = {}
    for folder in (".", "teacher"):
        for step in sorted((run / folder).glob("iter_*"))[-1:]:
            found |= {f"{folder} {key}": value for key, value in content.step(step).items()}
    return found
