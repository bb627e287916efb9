"""What the GPU can do at most: bytes a second of a large copy, operations a second of a large matrix product in bf16.

    python benchmarks/gpu_ceilings.py

Random operands, because zeros run faster than data. Medians. Writes results/gpu_ceilings.json and .md.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import torch


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of the device's clock, after a warm-up."""
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[3:])


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 1
    source = torch.randint(256, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    del source, target
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = 2 * size**3 / seconds(lambda: a @ b)
    report = {
        "what": "ceilings of a GPU", **machine.describe(), "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties().multi_processor_count,
        "copy_bytes_per_second": copied, "matmul_flops": product,
    }  # fmt: skip
    text = f"{report['device']}: copy {copied / 1e12:.2f} TB/s, bf16 matrix product {product / 1e12:.0f} TFLOP/s."
    machine.write(report, "gpu_ceilings", text, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
