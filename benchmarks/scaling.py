"""How the time of a step grows with layers, sequence and ranks, and how well `megatron-ext estimate` tells it.

    python benchmarks/scaling.py [--steps 7]

Tiny hybrids over gloo on 1, 2 and 4 processes of one thread. The cost model (`models/training_cost.py`) is given what a
matrix product and an all-reduce reach on as many processes at once here, and one efficiency, from the first point; it
predicts all others. Then the same model tells on paper what the 8B hybrid takes on 8 to 1,024 H100s.
Writes results/scaling.json, .md and .png. Wall times, so the machine must be idle.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import preset
from megatron_ext.models.training_cost import GPUS, Gpu, Layout, memory, scaled, step_seconds

HERE = Path(__file__).parent
ARCH = Architecture(
    pattern="M-*-", hidden_size=256, padded_vocab_size=4096, max_position_embeddings=2048, ffn_hidden_size=768,
    num_attention_heads=8, num_query_groups=4, kv_channels=32, mamba_num_heads=16, mamba_head_dim=32,
    mamba_state_dim=32, mamba_num_groups=4,
)  # fmt: skip
BASE = Layout(micro_batch=4, global_batch=4, seq_length=512, width=4, gradient_width=4, shard_optimizer=False)


@dataclass(frozen=True)
class Point:
    """One run: what it varies, and its model and layout."""

    what: str
    blocks: int = 1
    layout: Layout = BASE

    @property
    def architecture(self) -> Architecture:
        """The model."""
        return replace(ARCH, pattern=ARCH.pattern * self.blocks)


def _ranks(name: str, **sizes: int) -> Point:
    layout = replace(BASE, **sizes)
    batch = BASE.micro_batch * layout.dp * (4 if layout.pp > 1 else 1)  # four micro-batches through a pipeline
    return Point(name, 2, replace(layout, global_batch=batch))


POINTS = [
    Point("4 layers"), Point("8 layers", 2), Point("16 layers", 4), Point("32 layers", 8),
    *(Point(f"{length:,} tokens", 2, replace(BASE, seq_length=length)) for length in (256, 1024, 2048)),
    _ranks("data 2", dp=2), _ranks("data 4", dp=4), _ranks("tensor 2", tp=2), _ranks("tensor 4", tp=4),
    _ranks("pipeline 2", pp=2), _ranks("tensor 2, pipeline 2", tp=2, pp=2),
]  # fmt: skip


def speeds(out: Path) -> None:
    """In each of some processes at once: operations/s of a matrix product, bytes/s of an all-reduce; into `out`."""
    torch.distributed.init_process_group("gloo")
    a, gradients = torch.randn(512, 512), torch.ones(2**21)
    ranks = torch.distributed.get_world_size()

    def best(run: Any) -> float:
        times = []
        for _ in range(20):
            torch.distributed.barrier()
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def products() -> None:
        for _ in range(20):
            torch.mm(a, a)

    flops = 20 * 2 * 512**3 / best(products)
    reduce = best(lambda: torch.distributed.all_reduce(gradients))
    link = 2 * gradients.nbytes * (ranks - 1) / ranks / reduce if ranks > 1 else 1e12
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps({"flops": flops, "link": link}))
    torch.distributed.destroy_process_group()


def measured(point: Point, steps: int, folder: Path) -> float:
    """Median seconds of a step."""
    layout, out = point.layout, folder / "out.json"
    flags = [*point.architecture.to_flags(), "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4095"]
    flags += ["--seq-length", str(layout.seq_length), "--micro-batch-size", str(layout.micro_batch)]
    flags += ["--global-batch-size", str(layout.global_batch), "--lr", "1e-4", "--eval-iters", "0"]
    flags += ["--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp)]
    flags += ["--train-iters", str(steps + 3)]
    machine.torchrun(layout.gpus, str(HERE / "pretrain.py"), "--child", str(out), "ours", "0", *flags)
    return statistics.median(json.loads(out.read_text())["seconds"])


def paper() -> list[dict[str, Any]]:
    """The 8B hybrid of the study on 8 to 1,024 H100s, 4.2M tokens a step, by the same functions."""
    arch = preset("mamba2-hybrid-8b").architecture
    layout = Layout(tp=4, micro_batch=2, global_batch=1024, seq_length=4096, sequence_parallel=True,
                    overlap_gradients=True)  # fmt: skip
    found = []
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        own = scaled(layout, gpus)
        seconds = step_seconds(arch, own, GPUS["h100"], 0.45)
        step = sum(seconds.values())
        found.append({"gpus": gpus, "seconds": seconds, "tokens_per_second": own.tokens / step,
                      "memory_gb": sum(memory(arch, own).values()) / 1e9})  # fmt: skip
    return found


def draw(rows: list[dict[str, Any]], on_paper: list[dict[str, Any]], path: Path) -> None:
    """Measured and predicted seconds, and the speed on paper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    places = range(len(rows))
    left.bar([p - 0.2 for p in places], [row["measured"] for row in rows], 0.4, color="C0", label="measured")
    left.bar([p + 0.2 for p in places], [row["predicted"] for row in rows], 0.4, color="C1", label="predicted")
    left.set_xticks(list(places), [row["what"] for row in rows], rotation=60, ha="right", fontsize=8)
    left.set_ylabel("seconds of a step")
    left.legend(frameon=False)
    gpus = [row["gpus"] for row in on_paper]
    first = on_paper[0]["tokens_per_second"] / gpus[0]
    right.plot(gpus, [row["tokens_per_second"] for row in on_paper], marker="o", color="C1", label="estimated")
    right.plot(gpus, [first * count for count in gpus], "--", color="0.6", label="linear")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(gpus, [f"{count:,}" for count in gpus])
    right.set_yticks([1e5, 1e6, 1e7], ["0.1M", "1M", "10M"])
    right.set_xlabel("H100s, 8B hybrid, 4.2M tokens a step; on paper, not run")
    right.set_ylabel("tokens per second")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--speeds", type=Path, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.speeds is not None:
        speeds(sizes.speeds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, here = Path(name), {}
        for ranks in (1, 2, 4):
            machine.torchrun(ranks, __file__, "--speeds", str(folder / "speeds.json"))
            here[ranks] = json.loads((folder / "speeds.json").read_text())
        rows: list[dict[str, Any]] = []
        efficiency = 1.0
        for point in POINTS:
            speed = here[point.layout.gpus]
            # The model halves the peak for fp32, which is what was measured here.
            cpu = Gpu(2 * speed["flops"], 0.0, speed["link"], speed["link"])
            seconds = measured(point, sizes.steps, folder)
            if not rows:
                efficiency = sum(step_seconds(point.architecture, point.layout, cpu, 1.0).values()) / seconds
            causes = step_seconds(point.architecture, point.layout, cpu, efficiency)
            predicted = sum(causes.values())
            rows.append({"what": point.what, "measured": seconds, "predicted": predicted, "causes": causes,
                         "error": predicted / seconds - 1})  # fmt: skip
            print(f"{point.what}: {seconds:.3f} s, predicted {predicted:.3f} s", flush=True)
    errors = sorted(abs(row["error"]) for row in rows[1:])
    on_paper = paper()
    report = {
        "what": "seconds of a training step, measured and by the cost model of megatron-ext estimate",
        "median_error": statistics.median(errors), "largest_error": errors[-1], **machine.describe(),
        "efficiency": efficiency, "speeds": here, "points": rows, "paper": on_paper,
    }  # fmt: skip
    lines = [f"Median error of the cost model {statistics.median(errors):.0%}, largest {errors[-1]:.0%}.", ""]
    lines += ["| | measured, s | predicted, s | error |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['measured']:.3f} | {r['predicted']:.3f} | {r['error']:+.0%} |" for r in rows]
    lines += ["", "The 8B hybrid on H100s, on paper (not run): 45% of the peak in products, tensor parallel 4.", ""]
    lines += ["| GPUs | seconds of a step | tokens/s | GB a GPU |", "|---|---|---|---|"]
    for row in on_paper:
        step = sum(row["seconds"].values())
        lines.append(f"| {row['gpus']:,} | {step:.2f} | {row['tokens_per_second']:,.0f} | {row['memory_gb']:.0f} |")
    machine.write(report, "scaling", "\n".join(lines))
    draw(rows, on_paper, HERE / "results" / "scaling.png")


if __name__ == "__main__":
    main()
