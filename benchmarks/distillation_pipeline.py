"""What a teacher costs in its student's pipeline: a step over the student's own and the teacher's forward alone.

    python benchmarks/distillation_pipeline.py [--hidden 256] [--steps 10] [--rounds 3]

Two processes, two pipeline stages, mock data: pre-training the student, the teacher's forward passes alone, and
distilling take turns, each in processes of its own. A ratio of 1 says that the pipeline waits for nothing but the
teacher's arithmetic; below 1, that the two share bubbles. Wall times, so the machine must be idle.
Writes results/distillation_pipeline.json and .md.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from megatron_ext.reports.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
STAGES, SEQUENCE, BATCH, WARM_UP = 2, 256, 8, 2
TEACHER, STUDENT = "M-*-M-M-M-*-M-M-", "M-*-M-M-"


def model(pattern: str, hidden: int) -> list[str]:
    """Flags of a hybrid model."""
    return [
        f"--hybrid-layer-pattern={pattern}", "--hidden-size", str(hidden), "--ffn-hidden-size", str(3 * hidden),
        "--num-attention-heads", str(hidden // 32), "--kv-channels", "32", "--mamba-num-heads", str(hidden // 16),
        "--mamba-head-dim", "32", "--mamba-state-dim", "32", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
        "--swiglu", "--disable-bias-linear", "--position-embedding-type", "none",
        "--max-position-embeddings", str(SEQUENCE),
    ]  # fmt: skip


def common(steps: int) -> list[str]:
    """Flags of all runs."""
    return [
        "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "8191", "--seq-length", str(SEQUENCE),
        "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--pipeline-model-parallel-size", str(STAGES),
        "--lr", "1e-4", "--train-iters", str(steps), "--eval-iters", "0",
    ]  # fmt: skip


def trained(script: str, run: Path, *flags: str) -> float:
    """Median seconds of a step, the first ones left out."""
    machine.torchrun(STAGES, str(ROOT / script), "--save", str(run), "--save-interval", "1000000", *flags)
    steps = [step["seconds"] for step in read_metrics(run / "metrics.jsonl")]
    return statistics.median(steps[WARM_UP:])


def forward(out: Path, teacher: str, steps: int) -> None:
    """In each process: the teacher's forward passes over a global batch, median seconds into `out`."""
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.job import Job

    started = parse_command_line(Job("calibrate"), ["--load", teacher, *common(steps), "--skip-train"])
    import torch

    from megatron_ext.training.forward import forward_all, load_model, micro_batches

    chunks = load_model(started)
    batches = micro_batches(started, chunks, "train", BATCH)
    seconds = []
    for _ in range(steps):
        torch.distributed.barrier()
        begun = time.perf_counter()
        forward_all(started, chunks, [None if batch is None else iter(batch) for batch in batches], 1)
        seconds.append(time.perf_counter() - begun)
    if started.args.rank == 0:
        out.write_text(str(statistics.median(seconds[WARM_UP:])))


def measure(folder: Path, sizes: argparse.Namespace) -> dict[str, float]:
    """One round."""
    flags = common(sizes.steps)
    student = trained("pretrain_hybrid.py", folder / "student", *model(STUDENT, sizes.hidden), *flags)
    out = folder / "forward"
    machine.torchrun(
        STAGES, __file__, "--child", str(out), "--teacher", str(folder.parent / "teacher"), "--steps", str(sizes.steps)
    )
    distill = trained(
        "distill_gpt.py", folder / "distilled", *model(STUDENT, sizes.hidden), *flags,
        "--distill-teacher", str(folder.parent / "teacher"),
    )  # fmt: skip
    return {"student": student, "teacher_forward": float(out.read_text()), "distill": distill}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.child is not None:
        forward(sizes.child, sizes.teacher, sizes.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher = [*model(TEACHER, sizes.hidden), *common(1), "--save", f"{folder}/teacher"]
        machine.torchrun(STAGES, str(ROOT / "pretrain_hybrid.py"), *teacher)
        rounds = [measure(Path(folder) / str(number), sizes) for number in range(sizes.rounds)]
    ratios = [each["distill"] / (each["student"] + each["teacher_forward"]) for each in rounds]
    ratio = statistics.median(ratios)
    report: dict[str, Any] = {
        "what": "a distillation step over the student's step plus the teacher's forward, two pipeline stages",
        "ratio": ratio, "ratios": ratios, "rounds": rounds, **machine.describe(),
        "sizes": {"hidden": sizes.hidden, "teacher": TEACHER, "student": STUDENT, "sequence": SEQUENCE,
                  "micro_batches": BATCH, "steps": sizes.steps},
    }  # fmt: skip
    seconds = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    text = (
        f"A distillation step takes {ratio:.2f} of the student's step and the teacher's forward on the same two\n"
        f"pipeline stages: {seconds['distill']:.2f} s against {seconds['student']:.2f} + "
        f"{seconds['teacher_forward']:.2f} s ({report['machine']}, median of {sizes.rounds} rounds)."
    )
    machine.write(report, "distillation_pipeline", text)


if __name__ == "__main__":
    main()
