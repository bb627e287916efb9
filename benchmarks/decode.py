"""One more token at a growing context: tokens/s and cache bytes of a Transformer, a hybrid and Mamba-2 of equal size.

    python benchmarks/decode.py [--batch 1] [--contexts 1024 4096 16384 65536 131072] [--models hybrid Mamba-2]

The product's own step is timed (`inference.cached`, from token to logits) on models with random weights
and caches of the given length, which nothing has read before: what they hold does not change the time. The Transformer
comes with full multi-head attention and with grouped query heads, because what a hybrid gains depends on which. Beside
each figure stands the roofline: the bytes that `models/cost.py` counts, at the bandwidth of a copy measured in the same
run. Each model is a process of its own, in turns, `--rounds` times; medians over the rounds. On a GPU bf16 and about 8B
parameters, what does not fit is said; on a CPU fp32, tiny ones, and CPU times.
Writes results/decode_cuda or decode_cpu .json and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import BYTES, Workload, cache_bytes, decode_bytes_per_token
from megatron_ext.models.presets import PRESETS
from megatron_ext.platform.device import device_type

DEVICE = device_type()
PRESET = {
    "cuda": {"Transformer": "transformer-8b", "hybrid": "mamba2-hybrid-8b", "Mamba-2": "mamba2-8b"},
    "cpu": {"Transformer": "tiny-transformer", "hybrid": "tiny-hybrid", "Mamba-2": "tiny-mamba2"},
}
WIDTH = 1 if DEVICE == "cuda" else 2  # of BYTES, which are those of 16 bits
WARM_UP, STEPS = 4, 12
FULL, GROUPED = "Transformer, full heads", "Transformer, grouped"


def models() -> dict[str, tuple[str, Architecture]]:
    """Four of equal size: preset, and what of it is another."""
    found = {name: (preset, PRESETS[preset].architecture) for name, preset in PRESET[DEVICE].items()}
    preset, transformer = found.pop("Transformer")
    full = replace(transformer, num_query_groups=transformer.num_attention_heads)
    grouped = replace(transformer, num_query_groups=found["hybrid"][1].num_query_groups)
    return {FULL: (preset, full), GROUPED: (preset, grouped), **found}


def child(out: Path, name: str, batch: int, contexts: list[int], room: int) -> None:
    """Build a model and time its steps at each context, seconds; what does not fit is left out."""
    from megatron_ext.inference.session import JOB
    from megatron_ext.training.command_line import parse_command_line

    preset, arch = models()[name]
    longest = max(contexts) + WARM_UP + STEPS
    started = parse_command_line(JOB, [
        "--preset", preset, "--num-query-groups", str(arch.num_query_groups), "--seq-length", "1024",
        "--max-position-embeddings", str(longest), "--micro-batch-size", str(batch), "--global-batch-size", str(batch),
        *(["--bf16", "--ext-ssm-backend", "triton"] if DEVICE == "cuda" else []),
    ])  # fmt: skip
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.utils import unwrap_model

    from megatron_ext.inference.cached import CachedModel
    from megatron_ext.inference.sharded import ShardedModel
    from megatron_ext.training.forward import load_model

    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    model = ShardedModel(unwrap_model(load_model(started)), started.architecture, arch.padded_vocab_size)
    tokens = torch.randint(arch.padded_vocab_size, (batch, longest), device=torch.cuda.current_device())
    found: dict[str, Any] = {"parameters": arch.num_parameters(), "seconds": {}}
    with torch.no_grad(), InferenceMode.active():
        for length in contexts:
            if WIDTH * cache_bytes(arch, Workload(batch, length)) > room - WIDTH * BYTES * arch.num_parameters():
                continue
            cached = CachedModel(model, batch, length + WARM_UP + STEPS)
            # The first token makes Mamba-2's states and the memory for keys and values.
            cached.next_logits(tokens, 0, 1)
            cached.contexts[0].increment_sequence_len_offset(length - 1)
            seconds = []
            for position in range(length, length + WARM_UP + STEPS):
                torch.cuda.synchronize()
                begun = clock()
                cached.next_logits(tokens, position, position + 1)
                torch.cuda.synchronize()
                seconds.append(clock() - begun)
            found["seconds"][str(length)] = statistics.median(seconds[WARM_UP:])
            del cached
            torch.cuda.empty_cache()
    out.write_text(json.dumps(found))


def run_child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [str(out), name, str(args.batch), str(room()), *map(str, args.contexts)]
        done = subprocess.run([sys.executable, __file__, "--child", *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(out.read_text())


def bandwidth() -> float:
    """Bytes read and written in a second by a copy that no cache holds."""
    source = torch.zeros(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE)
    target, times = torch.empty_like(source), []
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    for _ in range(6):
        start = clock()
        target.copy_(source)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2 * source.numel() / statistics.median(times[1:])


def room() -> int:
    """Bytes that a model and its caches may take."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        return int(0.92 * torch.cuda.mem_get_info()[0])
    return int(0.3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def entries(name: str, runs: list[dict[str, Any]], args: argparse.Namespace, speed: float) -> dict[str, Any]:
    """What is told of a model, by context."""
    arch, found = models()[name][1], {}
    for context in args.contexts:
        seconds = [run["seconds"][str(context)] for run in runs if str(context) in run["seconds"]]
        if not seconds:
            continue
        load = Workload(args.batch, context)
        moved = WIDTH * args.batch * decode_bytes_per_token(arch, load)
        found[str(context)] = {
            "seconds": seconds, "cache_bytes": WIDTH * cache_bytes(arch, load),
            "tokens_per_second": args.batch / statistics.median(seconds),
            "roofline_tokens_per_second": args.batch * speed / moved,
        }  # fmt: skip
    return found


def table(report: dict[str, Any]) -> str:
    """Ratios of the hybrid first, measured beside what the bytes allow."""
    found, contexts = report["models"], report["contexts"]

    def ratio(context: str, base: str) -> str:
        ours, theirs = found.get("hybrid", {}).get(context), found.get(base, {}).get(context)
        if not ours or not theirs:
            return "not measured"
        keys = ("tokens_per_second", "roofline_tokens_per_second")
        measured, bytes_allow = (ours[key] / theirs[key] for key in keys)
        return f"{measured:.2f} ({bytes_allow:.2f})"

    names = list(found)
    head = ["context", "hybrid over full heads", "hybrid over grouped", *(f"{name}, tokens/s" for name in names)]
    lines = [
        f"One token of a batch of {report['batch']}, {report['dtype']}, {report['device']}; in brackets what the bytes "
        f"allow at {report['bandwidth'] / 1e9:,.0f} GB/s.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for context in map(str, contexts):
        cells = []
        for name in names:
            entry = found[name].get(context)
            cells.append(
                "not measured" if entry is None else
                f"{entry['tokens_per_second']:,.1f} ({entry['roofline_tokens_per_second']:,.0f}), "
                f"cache {entry['cache_bytes'] / 1e6:,.1f} MB"
            )  # fmt: skip
        row = [f"{int(context):,}", *(ratio(context, base) for base in (FULL, GROUPED)), *cells]
        lines.append("| " + " | ".join(row) + " |")
    lines += [f"\n{what}: not measured, {why}" for what, why in report["missing"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        out, name, batch, free, *contexts = sys.argv[2:]
        child(Path(out), name, int(batch), list(map(int, contexts)), int(free))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--models", nargs="+", choices=list(models()), default=list(models()))
    parser.add_argument("--rounds", type=int, default=3, help="times that each model is built and measured")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    speed, missing = bandwidth(), {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.models}
    for _ in range(args.rounds):
        for name in args.models:
            try:
                runs[name].append(run_child(name, args))
            except RuntimeError as error:
                missing[name] = f"failed: {str(error)[-500:]}"
    found = {name: entries(name, own, args, speed) for name, own in runs.items()}
    for name, entry in found.items():
        absent = [context for context in args.contexts if str(context) not in entry]
        missing |= {f"{name}, {context:,} tokens": "does not fit" for context in absent if name not in missing}
    report = {
        "what": "one token at a growing context", **machine.describe(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "dtype": "bfloat16" if DEVICE == "cuda" else "float32", "batch": args.batch, "contexts": args.contexts,
        "parameters": {name: models()[name][1].num_parameters() for name in args.models},
        "bandwidth": speed, "models": found, "missing": missing,
    }  # fmt: skip
    machine.write(report, f"decode_{DEVICE}", table(report), args.out)


if __name__ == "__main__":
    main()
