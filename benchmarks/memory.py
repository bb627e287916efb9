"""The memory that `megatron-ext estimate` tells against the measured peak of a training step, on several layouts.

    python benchmarks/memory.py [--tokens 512] [--hidden 256] [--cases NAME ...] [--jobs N] [--out FOLDER]

Each case is `pretrain_hybrid.py` or `distill_gpt.py` on one or two processes for three steps; the peak is that of the
fullest rank: on a CPU the bytes of all live tensors (`peak.py`), exact and the same on every run; on a GPU
`max_memory_allocated` of the last step, so that what Triton allocates to time its configurations is not in it. cuBLAS'
workspace is (32 MiB on Hopper); it is named apart and left out of the ratio, for it does not grow with a model. Bytes
do not depend on what else runs, so on a GPU cases run side by side (60 GB in all). Writes memory_cpu.json or
memory_cuda.json, and .md, anew after each case.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from peak import PeakMeter
from torch.utils._python_dispatch import _disable_current_modes

from megatron_ext.platform.device import device_type

ROOT = Path(__file__).parents[1]
DEVICE = device_type()
# On a GPU so large that what does not grow with the model is small beside it.
HIDDEN, TOKENS = {"cpu": 256, "cuda": 2048}, {"cpu": 512, "cuda": 2048}
BATCH, JOBS = {"cpu": (4, 8), "cuda": (2, 4)}[DEVICE], {"cpu": 1, "cuda": 6}[DEVICE]
HEAD, MAMBA_HEAD, STATES, WORDS = {"cpu": (32, 32, 32, 4096), "cuda": (128, 64, 128, 32000)}[DEVICE]
PATTERNS = {"Transformer": "*-*-*-*-", "Mamba-2": "MMMMMM", "hybrid": "M-M-*-M-"}
RECOMPUTED = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
HALVES = ["--tensor-model-parallel-size", "2"]
CORRECTED = ["--distill-correct-teacher", "together", "--save"]
# The output weights' gradient is too large to be kept.
LARGE = ["--vocab-size", "128255", "--hidden-size", "320", "--micro-batch-size", "1"]
# Name: model, flags, processes.
CASES: dict[str, tuple[str, list[str], int]] = {
    **{f"{name}, one process": (name, [], 1) for name in PATTERNS},
    "hybrid, bf16": ("hybrid", ["--bf16"], 1),
    "hybrid, recomputed": ("hybrid", RECOMPUTED, 1),
    "hybrid, bf16, recomputed": ("hybrid", ["--bf16", *RECOMPUTED], 1),
    "hybrid, tensor 2": ("hybrid", HALVES, 2),
    "hybrid, tensor 2, sequence parallel": ("hybrid", [*HALVES, "--sequence-parallel"], 2),
    "hybrid, pipeline 2": ("hybrid", ["--pipeline-model-parallel-size", "2"], 2),
    "hybrid, data 2, distributed optimizer": ("hybrid", ["--use-distributed-optimizer"], 2),
    "hybrid, context 2": ("hybrid", ["--context-parallel-size", "2"], 2),
    "hybrid, distilled from one of twice its layers": ("hybrid", ["--distill-teacher"], 1),
    "hybrid, bf16, distilled from one of twice its layers": ("hybrid", ["--bf16", "--distill-teacher"], 1),
    "hybrid, the same while the teacher is corrected": ("hybrid", [*CORRECTED, "--distill-teacher"], 1),
    "hybrid, distilled with a vocabulary of 128K": ("hybrid", [*LARGE, "--distill-teacher"], 1),
}  # fmt: skip
ON_ONE_GPU = [
    *(f"{name}, one process" for name in PATTERNS), "hybrid, bf16", "hybrid, bf16, recomputed",
    "hybrid, bf16, distilled from one of twice its layers",
]  # fmt: skip


def flags_of(case: str, tokens: int, hidden: int, teacher: Path) -> list[str]:
    """The command line of a case, or of its teacher, which is made at `teacher`."""
    name, flags, _ = CASES[case]
    values = {"--distill-teacher": str(teacher), "--save": str(teacher.with_name("corrected"))}
    flags = [word for flag in flags for word in (flag, values.get(flag)) if word is not None]
    return [
        f"--hybrid-layer-pattern={PATTERNS[name]}", "--hidden-size", str(hidden), "--ffn-hidden-size", str(3 * hidden),
        "--num-attention-heads", str(hidden // HEAD), "--group-query-attention", "--num-query-groups", "2",
        "--kv-channels", str(HEAD), "--mamba-num-heads", str(2 * hidden // MAMBA_HEAD), "--mamba-head-dim",
        str(MAMBA_HEAD), "--mamba-state-dim", str(STATES), "--mamba-num-groups", "2", "--normalization", "RMSNorm",
        "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope",
        "--untie-embeddings-and-output-weights", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size",
        str(WORDS - 1), "--seq-length", str(tokens), "--max-position-embeddings", str(tokens), "--micro-batch-size",
        str(BATCH[0]), "--global-batch-size", str(BATCH[1]), "--train-iters", "3", "--lr", "1e-4", "--eval-iters", "0",
        *(["--ext-ssm-backend", "triton"] if DEVICE == "cuda" else []), *flags,
    ]  # fmt: skip


def child(out: Path, flags: list[str]) -> None:
    """Train in this process; its peak and the estimate into a file of its rank."""
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.job import STOPPABLE, Job

    lesson = None
    if "--distill-teacher" in flags:
        from megatron_ext.distillation import job

        started = parse_command_line(job.JOB, flags)
        source: Any = job.check(started)
        train, lesson = partial(job.distill, started, source), job.teacher_setup(started, source)
    else:
        from megatron_ext.training import loop

        started = parse_command_line(Job("pretrain", defaults=STOPPABLE), flags)
        train = partial(loop.train, started)
    from megatron_ext.models.training_cost import Layout, memory

    if DEVICE == "cuda":
        measure_each_step()
        train()
        peak = torch.cuda.max_memory_allocated()
    else:
        from megatron_ext.platform import transformer_engine

        # A mask without entries, which torch cannot make of what a dispatch mode returns.
        transformer_engine.causal_lower_right = _disable_current_modes()(transformer_engine.causal_lower_right)
        with PeakMeter() as meter:
            train()
        peak = meter.peak
    layout = replace(Layout.from_args(started.args), fused=DEVICE == "cuda")
    found = {"peak": peak, "workspace": cublas_workspace(), "estimate": memory(started.architecture, layout, lesson)}
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def measure_each_step() -> None:
    """Let the peak be that of the last step: in the first one kernels are timed, in memory that is given back."""
    from megatron.training import training

    inner = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        return inner(*args, **kwargs)

    training.train_step = step


def cublas_workspace() -> int:
    """Bytes that cuBLAS holds, which torch's allocator gave it."""
    if DEVICE != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated()


def teacher_flags(case: str, tokens: int, hidden: int, path: Path) -> list[str]:
    """The command line that makes the teacher of a case: twice the layers, after one step."""
    flags = [word for word in CASES[case][1] if word not in ("--distill-teacher", *CORRECTED)]
    twice = [f"--hybrid-layer-pattern={PATTERNS['hybrid'] * 2}", "--train-iters", "1", "--save", str(path)]
    twice += ["--no-save-optim"]
    return [*flags_of("hybrid, one process", tokens, hidden, path), *flags, *twice]


def measure(case: str, tokens: int, hidden: int) -> dict[str, Any]:
    """Run a case; the peak of its fullest rank and the estimate, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        if "--distill-teacher" in CASES[case][1]:
            made = teacher_flags(case, tokens, hidden, Path(folder) / "teacher")
            machine.torchrun(1, str(ROOT / "pretrain_hybrid.py"), *made)
        machine.torchrun(CASES[case][2], __file__, "--child", str(out), case, str(tokens), str(hidden))
        ranks = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
    fullest, estimate = max(ranks, key=lambda rank: rank["peak"]), ranks[0]["estimate"]
    peak, workspace = fullest["peak"], fullest["workspace"]
    ratio = sum(estimate.values()) / (peak - workspace)
    return {"peak_bytes": peak, "cublas_bytes": workspace, "estimate_bytes": estimate, "ratio": ratio}


def attempt(case: str, tokens: int, hidden: int) -> dict[str, Any]:
    """A case, or why it failed."""
    try:
        return measure(case, tokens, hidden)
    except SystemExit as error:
        return {"error": str(error)[-2000:]}


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        out, case, tokens, hidden = sys.argv[2:]
        child(Path(out), flags_of(case, int(tokens), int(hidden), Path(out).parent / "teacher"))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS[DEVICE])
    parser.add_argument("--hidden", type=int, default=HIDDEN[DEVICE])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="by default all, or those of one GPU")
    parser.add_argument("--jobs", type=int, default=JOBS, help="cases at a time")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    names = args.cases or (ON_ONE_GPU if DEVICE == "cuda" else list(CASES))
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(attempt, name, args.tokens, args.hidden): name for name in names}
        for done in as_completed(running):
            found[running[done]] = done.result()
            ordered = {name: found[name] for name in names if name in found}
            with contextlib.nullcontext() if len(found) == len(names) else contextlib.redirect_stdout(None):
                write(ordered, args)  # what there is, should the rest take too long


def write(found: dict[str, Any], args: argparse.Namespace) -> None:
    """The cases so far."""
    measured = {name: case for name, case in found.items() if "error" not in case}
    report = {
        "what": "estimated memory of a training step over the measured peak",
        "ratios": {name: case["ratio"] for name, case in measured.items()},
        **machine.describe(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "sizes": {"tokens": args.tokens, "hidden": args.hidden, "batch": BATCH},
        "cases": found,
    }
    lines = ["| | estimated, MB | measured, MB | of it cuBLAS' | ratio |", "|---|---|---|---|---|"]
    for name, case in found.items():
        if name not in measured:
            last = case["error"].strip().splitlines()[-1:] or ["?"]
            lines.append(f"| {name} | | failed: {last[0]} | | |")
            continue
        told, peak = sum(case["estimate_bytes"].values()) / 1e6, case["peak_bytes"] / 1e6
        lines.append(f"| {name} | {told:.1f} | {peak:.1f} | {case['cublas_bytes'] / 1e6:.1f} | {case['ratio']:.3f} |")
    machine.write(report, f"memory_{DEVICE}", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
