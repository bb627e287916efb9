"""Leaving each attention sub-layer out of a model of the size of SmolLM2-135M: time over the floor.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/leave_one_out.py [--tokens 2048] [--precision fp32 bf16]

The floor is what an evaluation cannot do without: the layers after the one that is left out, once for each token, and
the output layer with its loss. The time of a layer of each kind and of the end is the median over plain forward passes
of the same tokens, taken before, between and after the evaluations. CPU time of one thread, random weights and tokens.
Writes results/leave_one_out_cpu.json and .md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch

LAYERS, LENGTH = 30, 512


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("layers", "vocabulary", "tokens")]
    report(args, {p: alone(*options, "--precision", p) for p in args.precision})


def alone(*words: str) -> dict[str, Any]:
    """What is measured in a process of its own, whose last line it is."""
    command = [sys.executable, __file__, "--child", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def flags(args: argparse.Namespace) -> list[str]:
    """The model, its data, and how much of it is run at a time."""
    return [
        f"--hybrid-layer-pattern={'*-' * args.layers}", "--hidden-size", "576", "--ffn-hidden-size", "1536",
        "--num-attention-heads", "9", "--group-query-attention", "--num-query-groups", "3", "--kv-channels", "64",
        "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope",
        "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(args.vocabulary - 1),
        "--seq-length", str(LENGTH), "--max-position-embeddings", str(LENGTH), "--micro-batch-size", "2",
        "--global-batch-size", "2", *["--bf16"] * ("bf16" in args.precision),
    ]  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluations and plain passes in turns, in this process."""
    from megatron_ext.pruning import job
    from megatron_ext.training.command_line import parse_command_line

    started = parse_command_line(job.JOB, flags(args))
    from megatron.core.utils import unwrap_model

    from megatron_ext.pruning.ablation import Ablation, Passes
    from megatron_ext.training.forward import forward_sums, load_model, micro_batches

    model = load_model(started)
    chunks = unwrap_model(model)
    batches = micro_batches(started, model, "train", args.tokens // LENGTH)

    def run(begin: int, end: int) -> tuple[float, float]:
        return forward_sums(started, model, [iter(own[begin:end]) for own in batches], end - begin)["loss"]

    count = args.tokens // LENGTH // 2
    with torch.no_grad():
        run(0, count)
        parts: list[dict[str, float]] = [plain_pass(chunks[0], lambda: run(0, count))]
        ablation = Ablation(chunks, started.architecture, Passes(run, count, 2 * LENGTH))
        ablation.outcome(())
        seconds = []
        for place in range(args.layers):
            begun = time.process_time()
            ablation.outcome([2 * place])
            seconds.append(time.process_time() - begun)
        calls = sum(ablation.calls.values())
        ablation.remove()
        parts += [plain_pass(chunks[0], lambda: run(0, count)) for _ in range(2)]
    cost = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    floor = sum(
        (args.layers - place - 1) * cost["*"] + (args.layers - place) * cost["-"] + cost["end"]
        for place in range(args.layers)
    )
    return {"seconds": sum(seconds), "floor": floor, "ratio": sum(seconds) / floor, "parts": cost, "calls": calls}


def plain_pass(model: Any, run: Any) -> dict[str, float]:
    """Seconds of all micro-batches of a layer of each kind (the median), and of what comes after the last one."""
    spent = [0.0] * len(model.decoder.layers)
    last, end = 0.0, 0.0

    def timed(index: int, plain: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            begun = time.process_time()
            found = plain(*args, **kwargs)
            last = time.process_time()
            spent[index] += last - begun
            return found

        return forward

    def after(*_: Any) -> None:
        nonlocal end
        end += time.process_time() - last

    for index, layer in enumerate(model.decoder.layers):
        layer.forward = timed(index, layer.forward)
    hook = model.register_forward_hook(after)
    run()
    hook.remove()
    for layer in model.decoder.layers:
        del layer.forward
    return {"*": statistics.median(spent[::2]), "-": statistics.median(spent[1::2]), "end": end}


def report(args: argparse.Namespace, cases: dict[str, Any]) -> None:
    """Write what was found."""
    found = {
        "what": "leaving each attention sub-layer out: CPU time over the floor",
        **machine.describe(),
        "device": "CPU",
        "sizes": {name: getattr(args, name) for name in ("tokens", "layers", "vocabulary")},
        "cases": cases,
    }
    lines = ["| | tokens | evaluations | seconds | floor | ratio |", "|---|---|---|---|---|---|"]
    for name, case in cases.items():
        row = f"{case['seconds']:.1f} | {case['floor']:.1f} | {case['ratio']:.2f}x"
        lines.append(f"| {name} | {args.tokens:,} | {args.layers} | {row} |")
    machine.write(found, "leave_one_out_cpu", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
