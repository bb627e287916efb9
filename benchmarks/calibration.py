"""What measuring importance adds to a forward pass: the calibration hooks on and off, over the same tokens.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/calibration.py [--hidden 1024] [--out FOLDER]

One process, a hybrid model with random weights, mock data; on a GPU in bf16. Passes with the hooks (all width scores
and the three static depth scores) and without take turns; CPU times on a CPU, wall times on a GPU; the ratio is the
median over the turns.
Writes calibration.json, on a GPU calibration_cuda.json, and prints one line.
"""

import argparse
import statistics
import time
from pathlib import Path

import machine
import torch

from megatron_ext.platform.device import device_type
from megatron_ext.pruning import job
from megatron_ext.pruning.depth import BlockInfluence
from megatron_ext.pruning.importance import Importance
from megatron_ext.training.command_line import parse_command_line


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    large = 4096 if device_type() == "cuda" else 1024  # what a GPU does must take longer than to ask it for it
    parser.add_argument("--hidden", type=int, default=large)
    parser.add_argument("--tokens", type=int, default=large)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the results")
    sizes = parser.parse_args()
    out = sizes.out
    del sizes.out  # no size
    hidden = sizes.hidden
    started = parse_command_line(
        job.JOB,
        [
            "--hybrid-layer-pattern=M-M-*-M-", "--hidden-size", str(hidden), "--ffn-hidden-size", str(3 * hidden),
            "--num-attention-heads", str(hidden // 64), "--kv-channels", "64", "--mamba-num-heads", str(hidden // 32),
            "--mamba-head-dim", "64", "--mamba-state-dim", "64", "--mamba-num-groups", "2", "--normalization",
            "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "none",
            "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "32000",
            "--seq-length", str(sizes.tokens), "--max-position-embeddings", str(sizes.tokens),
            "--micro-batch-size", "1", "--global-batch-size", "1", *(["--bf16"] if device_type() == "cuda" else []),
        ],
    )  # fmt: skip
    from megatron.core.utils import unwrap_model

    from megatron_ext.training.forward import forward_all, load_model, micro_batches

    model = load_model(started)
    chunks = unwrap_model(model)
    batches = micro_batches(started, model, "train", 1)

    def seconds() -> float:
        clock = time.perf_counter if device_type() == "cuda" else time.process_time
        torch.cuda.synchronize()
        begun = clock()
        forward_all(started, model, [iter(batch) for batch in batches if batch is not None], 1)
        torch.cuda.synchronize()
        return clock() - begun

    seconds()  # warm up; the first turn, which warms up what the hooks do, does not count
    ratios, plains = [], []
    for turn in range(-1, sizes.repeats):
        plain = seconds()
        hooks = Importance(chunks, started.architecture), BlockInfluence(chunks, started.architecture)
        hooked = seconds()
        if turn >= 0:
            ratios.append(hooked / plain)
            plains.append(plain)
        for hook in hooks:
            hook.remove()
    ratio = statistics.median(ratios)
    report = {
        "what": "forward pass with all calibration hooks over the same one without",
        **machine.describe(),
        "device": torch.cuda.get_device_properties(0).name,
        "sizes": vars(sizes),
        "parameters": started.architecture.num_parameters(),
        "plain_seconds": statistics.median(plains),
        "ratio": ratio,
        "ratios": ratios,
    }
    text = f"a calibration pass takes {ratio:.3f} of a plain forward pass ({statistics.median(plains):.3f} s)"
    machine.write(report, "calibration_cuda" if device_type() == "cuda" else "calibration", text, out)


if __name__ == "__main__":
    main()
