"""Applying a plan against copying the same bytes with cp: time, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/apply.py [--gigabytes 4] [--repeats 3] [--directory DIR]

A synthetic bf16 checkpoint of Llama-like layers, saved as two tensor-parallel ranks save it, is cut by three plans: one
keeps everything, one halves each width, one drops half of the layers. `cp` copies the checkpoint in turns with each;
both are followed by a flush to disk, apply its own. The ratio is the median over the repeats of apply's seconds over
cp's, for the bytes that the plan reads: all of them, or those of the layers that stay. Both run in processes that were
started alike (on a virtual machine it matters how long ago the kernel last used its free memory); the peak resident
memory of apply's, with all that it imports, is beside the bar: twice the largest tensor plus 500 MB.
Writes results/apply.json and prints one table.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import disk
import machine
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores, shapes
from megatron_ext.pruning.select import make_plan

MEGABYTE = 10**6


def model(gigabytes: float) -> Architecture:
    """Layers of Llama 3.1 8B, as many as it takes, with a quarter of the vocabulary."""
    whole = replace(PRESETS["llama3.1-8b"].architecture, padded_vocab_size=32064)
    one, two = (replace(whole, pattern="*-" * n).num_parameters() for n in (1, 2))
    return replace(whole, pattern="*-" * max(2, ceil((gigabytes * 1e9 / 2 - one) / (two - one)) + 1))


def save(arch: Architecture, path: Path) -> None:
    """Random weights, in two parts each as two tensor ranks store them, some of them in columns."""
    with writing(path, arch) as writer:
        for key, shape in axes.tensors(arch).items():
            tensor = disk.weight(shape)
            dimension = 1 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
            if len(shape) == 1:
                writer.write(key, tensor)
                continue
            # What two ranks would save: an entry of the index for each part.
            chunks: list[ChunkStorageMetadata] = []
            offset = [0, 0]
            for part in tensor.chunk(2, dim=dimension):
                writer.write(f"{key}/part", part)
                metadata, storage = writer.part()
                stored, place = (
                    metadata.pop(f"{key}/part"),
                    storage.pop(MetadataIndex(f"{key}/part", torch.Size([0, 0]))),
                )
                chunks.append(ChunkStorageMetadata(torch.Size(offset), part.shape))
                storage[MetadataIndex(key, torch.Size(offset))] = place
                offset[dimension] += part.shape[dimension]
                metadata[key] = TensorStorageMetadata(stored.properties, tensor.shape, chunks)


def plans(arch: Architecture) -> dict[str, Plan]:
    """The cuts, by name."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes(arch).items()}
    scores = Scores(values=values, architecture=arch)
    half = Targets(hidden_size=arch.hidden_size // 2, ffn_hidden_size=arch.ffn_hidden_size // 2)
    return {
        "keep everything": Plan.keep_everything(arch),
        "half of each width": make_plan(scores, arch, half),
        "half of the layers": make_plan(scores, arch, Targets(num_layers=len(arch.layers.blocks) // 2)),
    }


def originals(plan: Plan) -> list[str]:
    """The weights of the original that a plan needs."""
    staying = {f"{axes.LAYER}.{layer}" for layer in plan.units}
    keys = axes.keys(plan.source)
    return [key for key in keys if not key.startswith(axes.LAYER) or ".".join(key.split(".")[:3]) in staying]


def child(what: str, plan: str, source: str, destination: str) -> None:
    """Apply or copy, and print the seconds and the peak of resident memory in bytes; imports are not timed."""
    loaded = Plan.load(plan)
    started = time.perf_counter()
    if what == "apply":
        apply(loaded, source, destination)
    else:
        machine.copy(source, destination)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, machine.peak_memory()]))


def run(what: str, plan: Path, source: Path, destination: Path) -> tuple[float, int, int]:
    """`child` in a new process: seconds, peak bytes, and bytes written."""
    seconds, peak = machine.in_new_process(__file__, what, plan, source, destination)
    written = sum(path.stat().st_size for path in destination.rglob("*.distcp"))
    shutil.rmtree(destination)
    return seconds, peak, written


def measure(directory: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """All plans, in turns with cp."""
    arch = model(gigabytes)
    source, out = directory / "source", directory / "out"
    save(arch, source)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    reader = CheckpointReader(source)
    largest = max(2 * torch.Size(shape).numel() for shape in reader.shapes.values())
    os.sync()
    results = []
    for name, plan in plans(arch).items():
        plan.save(directory / "plan.json")
        ratios, copies, applies, peaks, written = [], [], [], [], 0
        read = sum(torch.Size(reader.shapes[old]).numel() for old in originals(plan)) / arch.num_parameters()
        for number in range(repeats):
            found = {}
            for what in ("cp", "apply") if number % 2 else ("apply", "cp"):
                found[what] = run(what, directory / "plan.json", source, out)
            (copied, _, _), (seconds, peak, written) = found["cp"], found["apply"]
            ratios.append(seconds / (copied * read))
            copies.append(copied)
            applies.append(seconds)
            peaks.append(peak)
        results.append(
            {
                "plan": name, "share_read": read, "bytes_written": written, "cp_seconds": statistics.median(copies),
                "apply_seconds": statistics.median(applies), "ratio": statistics.median(ratios), "ratios": ratios,
                "peak_bytes": max(peaks), "bar_bytes": 2 * largest + 500 * MEGABYTE,
            }
        )  # fmt: skip
    return {"bytes": size, "largest_tensor": largest, "parameters": arch.num_parameters(), "results": results}


def main() -> None:
    """Measure, print, write."""
    args = disk.arguments(__doc__, child=4)
    if args.child:
        child(*args.child)
        return
    where = machine.describe()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        found = measure(Path(directory), args.gigabytes, args.repeats)
    report = {"what": "plans applied, against cp", **where, **found}
    path = Path(__file__).parent / "results" / "apply.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{found['bytes'] / 1e9:.1f} GB, largest tensor {found['largest_tensor'] / 1e6:.0f} MB")
    print(f"{'plan':22}{'cp s':>8}{'apply s':>9}{'ratio':>8}{'peak MB':>9}{'bar MB':>8}")
    for row in found["results"]:
        print(
            f"{row['plan']:22}{row['cp_seconds']:8.2f}{row['apply_seconds']:9.2f}{row['ratio']:8.2f}"
            f"{row['peak_bytes'] / 1e6:9.0f}{row['bar_bytes'] / 1e6:8.0f}"
        )


if __name__ == "__main__":
    main()
