"""Conversion against copying the same bytes with cp: time, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/convert.py [--gigabytes 4] [--repeats 3] [--directory DIR]

Synthetic bf16 models, layers of Llama 3.1 8B (query, key and value become one weight, gate and up another) and of
Nemotron-H 8B (one projection becomes five weights), in shards of 1 GB. `cp` copies the input in turns with each
direction; both are followed by a flush to disk, conversion's its own. Both run in processes that were started alike;
the peak resident memory of conversion's, with all that it imports, is beside the bar: twice the largest tensor plus
1 GB.
Writes results/convert.json and results/convert.md.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import disk
import machine
import torch

from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.huggingface import families
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.huggingface.mappings import hf_shapes
from megatron_ext.checkpoint.huggingface.shards import writing_shards
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import PRESETS

GIGABYTE = 10**9
MODELS = {"LlamaForCausalLM": ("llama3.1-8b", "*-"), "NemotronHForCausalLM": ("nemotron-h-8b", "M-M*-")}


def model(name: str, gigabytes: float) -> Architecture:
    """As many blocks as it takes, with a small vocabulary."""
    preset, block = MODELS[name]
    whole = replace(PRESETS[preset].architecture, padded_vocab_size=32_064)
    one, two = (replace(whole, pattern=block * n).num_parameters() for n in (1, 2))
    return replace(whole, pattern=block * max(1, round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1))


def save(name: str, arch: Architecture, path: Path) -> None:
    """The model as a Hugging Face directory."""
    family = families.named(name)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(family.write(arch) | {"torch_dtype": "bfloat16"}))
    shapes = hf_shapes(arch, family.bind(arch))
    tensors = {key: TensorEntry(shape, torch.bfloat16) for key, shape in shapes.items()}
    with writing_shards(path, tensors, GIGABYTE) as writer:
        for key, shape in shapes.items():
            writer.write(key, disk.weight(shape))


def child(what: str, source: str, destination: str) -> None:
    """Convert or copy, and print the seconds and the peak of resident memory in bytes; imports are not timed."""
    started = time.perf_counter()
    if what == "to megatron":
        to_megatron(source, destination)
    elif what == "to hf":
        to_hf(source, destination, shard_bytes=GIGABYTE)
    else:
        machine.copy(source, destination)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, machine.peak_memory()]))


def run(what: str, source: Path, destination: Path) -> tuple[float, int]:
    """`child` in a new process: seconds and peak bytes. The destination is removed again."""
    seconds, peak = machine.in_new_process(__file__, what, source, destination)
    shutil.rmtree(destination)
    return seconds, peak


def measure(name: str, directory: Path, gigabytes: float, repeats: int) -> list[dict[str, Any]]:
    """Both directions of one model, in turns with cp."""
    arch = model(name, gigabytes)
    save(name, arch, directory / "hf")
    to_megatron(directory / "hf", directory / "megatron")
    os.sync()
    largest = 2 * max(axes.size(arch, key) for key in axes.keys(arch))
    rows = []
    for what, source in (("to megatron", directory / "hf"), ("to hf", directory / "megatron")):
        ratios, copies, conversions, peaks = [], [], [], []
        for number in range(repeats):
            found = {}
            for job in ("cp", what) if number % 2 else (what, "cp"):
                found[job] = run(job, source, directory / "out")
            ratios.append(found[what][0] / found["cp"][0])
            copies.append(found["cp"][0])
            conversions.append(found[what][0])
            peaks.append(found[what][1])
        rows.append(
            {
                "model": name, "direction": what, "bytes": 2 * arch.num_parameters(), "largest_tensor": largest,
                "cp_seconds": statistics.median(copies), "convert_seconds": statistics.median(conversions),
                "ratio": statistics.median(ratios), "ratios": ratios, "peak_bytes": max(peaks),
                "bar_bytes": 2 * largest + GIGABYTE,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, write."""
    args = disk.arguments(__doc__, child=3)
    if args.child:
        child(*args.child)
        return
    where = machine.describe()
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            rows += measure(name, Path(directory), args.gigabytes, args.repeats)
    lines = [
        "| model | direction | GB | cp s | convert s | ratio | peak MB | bar MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['direction']} | {row['bytes'] / 1e9:.1f} | {row['cp_seconds']:.2f} "
        f"| {row['convert_seconds']:.2f} | {row['ratio']:.2f} | {row['peak_bytes'] / 1e6:.0f} "
        f"| {row['bar_bytes'] / 1e6:.0f} |"
        for row in rows
    ]
    report = {"what": "conversion, against cp", **where, "results": rows}
    machine.write(report, "convert", "\n".join(lines))


if __name__ == "__main__":
    main()
