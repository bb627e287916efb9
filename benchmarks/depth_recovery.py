"""What stands in place of dropped sub-layers gives back of the loss, and of which ones: arXiv 2407.16286 in miniature.

    megatron-ext convert --from gguf --to megatron SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/depth_recovery.py --model smollm2

SmolLM2-135M, or any checkpoint with its tokenizer beside it, is loaded once. The sub-layers of the least block
influence go, attention or MLPs, 1, 2, 4 or 8 of them; each arm is fitted on training text and measured on held-out
text, both of the Python standard library, in place, which gives what the cut checkpoint gives
(`tests/distributed/test_recovery.py`). On the clean stream: the mean update, without the first four tokens of each
sequence in the mean, and with a mean of their own for those (not a feature: it shows what that would be worth), and
linear maps of rank 4, 16 and 64. On the pruned one, which takes a pass for each sub-layer: the mean, and rank 16.
Writes results/depth_recovery.{json,md,png}. The claim: a bias gives back a fifth of what dropping one or two costs, and
less of more.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, sized_arguments, write
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from torch import Tensor

from megatron_ext.data.corpus import build_dataset
from megatron_ext.models.pattern import ATTENTION, MLP
from megatron_ext.pruning import job
from megatron_ext.pruning import scores as score_names
from megatron_ext.pruning.depth import BlockInfluence
from megatron_ext.pruning.emulation import Emulator, Moments, fit
from megatron_ext.pruning.fitting import EmulatedUpdates, Fitting, fit_all, spans
from megatron_ext.reports.figures import COLORS, STYLE, save
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.forward import forward_all, load_model, micro_batches
from megatron_ext.training.job import Job

RESULTS = Path(__file__).parent / "results"
KINDS = {"attention": ATTENTION, "MLP": MLP}
COUNTS = (1, 2, 4, 8)
BATCH, SKIP, RIDGE = 2, 4, 1e-4
RANKS = (4, 16, 64)
MAIN = "bias, pruned stream"
LATER, APART = f"bias, first {SKIP} tokens not counted", f"bias, first {SKIP} tokens apart"
ARMS = ["nothing", "bias", LATER, APART, *(f"rank {rank}" for rank in RANKS)]
PRUNED = {MAIN: Fitting(stream="pruned"), "rank 16, pruned stream": Fitting(16, RIDGE, "pruned", SKIP)}


@dataclass(frozen=True)
class FirstTokensApart(Emulator):
    """A bias for all tokens of a sequence but the first ones, which have one of their own."""

    first: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, x: Tensor) -> Tensor:
        """Of (s, b, h), whole sequences."""
        update = super().__call__(x).clone()
        update[:SKIP] = self.first.to(x)
        return update


class Bench:
    """The model, loaded once, and its text."""

    def __init__(self, out: Path, model: Path, arguments: argparse.Namespace) -> None:
        from megatron.core.utils import unwrap_model

        tokenizer = model / "huggingface"
        if not (out / "text" / "manifest.json").is_file():
            build_dataset(out / "text", tokenizer=tokenizer, max_bytes=4_000_000)
        flags = [
            "--load", str(model), "--data-path", str(out / "text" / "text_document"), "--split", "90,10,0",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer),
            "--seq-length", str(arguments.sequence), "--micro-batch-size", str(BATCH),
            "--global-batch-size", str(BATCH),
        ]  # fmt: skip
        self.run = parse_command_line(Job("benchmark", defaults=job.JOB.defaults), flags)
        self.arch = self.run.architecture
        self.model = load_model(self.run)
        self.chunks = unwrap_model(self.model)
        self.samples = {"train": arguments.samples, "valid": arguments.held_out}
        self.text = {split: micro_batches(self.run, self.model, split, count) for split, count in self.samples.items()}  # type: ignore[arg-type]

    def loss(self, split: str) -> float:
        """Nats per token."""
        return forward_all(self.run, self.model, [iter(self.text[split][0])], self.samples[split] // BATCH)["loss"]

    def influence(self) -> Tensor:
        """Block influence of each sub-layer, on training text."""
        hooks = BlockInfluence(self.chunks, self.arch)
        self.loss("train")
        hooks.remove()
        found = hooks.gather()
        assert found is not None
        return found[score_names.depth("block_influence")]

    def moments(self, dropped: Sequence[int], skip: int) -> dict[int, Moments]:
        """Of these sub-layers, on the clean stream."""
        watched = EmulatedUpdates(self.chunks, self.arch, spans(dropped, joint=False), skip)
        found = watched.moments(dropped, Fitting(max(RANKS)), lambda: self.loss("train"))
        watched.remove()
        return found

    def fitted(self, dropped: Sequence[int], fitting: Fitting) -> dict[int, Emulator]:
        """What stands for these sub-layers on the pruned stream."""
        emulated = spans(dropped, joint=False)
        watched = EmulatedUpdates(self.chunks, self.arch, emulated, fitting.skip)
        found = fit_all(watched, emulated, fitting, lambda: self.loss("train"))
        watched.remove()
        return found

    def measured(self, emulators: Mapping[int, Emulator]) -> float:
        """The loss on held-out text with these in place."""
        emulated = spans(emulators, joint=False)
        replaced = EmulatedUpdates(self.chunks, self.arch, emulated, 0)
        replaced.emulators |= emulators
        try:
            return self.loss("valid")
        finally:
            replaced.remove()


def arms(bench: Bench, dropped: Sequence[int], say: Callable[[str], None]) -> tuple[dict[str, float], dict[str, Any]]:
    """Each arm's loss; and what maps of each rank explain of each sub-layer."""
    size, length = bench.arch.hidden_size, bench.run.args.seq_length
    every, later = bench.moments(dropped, 0), bench.moments(dropped, SKIP)
    means = [{unit: fit(own, 0, 0.0) for unit, own in moments.items()} for moments in (every, later)]
    found: dict[str, dict[int, Emulator]] = {
        "nothing": {unit: Emulator(torch.zeros(size)) for unit in dropped},
        "bias": means[0],
        LATER: means[1],
    }
    # The mean over the first tokens follows from the two means.
    found[APART] = {
        unit: FirstTokensApart(rest.bias, first=(whole.bias * length - rest.bias * (length - SKIP)) / SKIP)
        for (unit, whole), rest in zip(means[0].items(), means[1].values(), strict=True)
    }
    found |= {f"rank {rank}": {unit: fit(own, rank, RIDGE) for unit, own in later.items()} for rank in RANKS}
    found |= {name: bench.fitted(dropped, fitting) for name, fitting in PRUNED.items()}
    losses = {}
    for name, emulators in found.items():
        losses[name] = bench.measured(emulators)
        say(f"{name}: {losses[name]:.4f}")
    explained = {
        str(unit): {
            "size": own.size, "mean": own.mean, "explained": {str(r): float(own.explained[r]) for r in (*RANKS, size)}
        }
        for unit, own in found[f"rank {RANKS[0]}"].items()
    }  # fmt: skip
    return losses, explained


def given_back(row: Mapping[str, Any], arm: str, original: float) -> float:
    """The share of what dropping costs that an arm gives back."""
    bare = row["losses"]["nothing"]
    return (bare - row["losses"][arm]) / (bare - original) if bare != original else 0.0


def markdown(result: Mapping[str, Any]) -> str:
    """The report."""
    names = [*ARMS, *PRUNED]
    lines = [
        f"# Depth recovery of {result['model']}",
        "",
        f"{result['parameters']:,} parameters, hidden size {result['hidden_size']}, `{result['pattern']}`; "
        f"{result['calibration_tokens']:,} tokens of calibration, {result['held_out_tokens']:,} held out, sequences of "
        f"{result['sequence']}, float32. Loss of the original: {result['original']:.4f} nats per token. "
        f"{result['date']}, {result['machine']}, commit {result['commit']}. Written by `benchmarks/depth_recovery.py`.",
        "",
        "Loss without the sub-layers of the least block influence, by what stands in their place, and the share of the "
        "damage that it gives back:",
        "",
        "| in place of | " + " | ".join(f"{row['count']} {row['kind']}" for row in result["rows"]) + " |",
        "|---|" + "---:|" * len(result["rows"]),
    ]
    for name in names:
        cells = []
        for row in result["rows"]:
            share = "" if name == "nothing" else f" ({given_back(row, name, result['original']):.0%})"
            cells.append(f"{row['losses'][name]:.4f}{share}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *verdict(result)])


def verdict(result: Mapping[str, Any]) -> list[str]:
    """The claim, kind by kind."""
    lines = []
    for kind in KINDS:
        own = [row for row in result["rows"] if row["kind"] == kind]
        shares = {row["count"]: given_back(row, "bias", result["original"]) for row in own}
        few = [share for count, share in shares.items() if count <= 2]
        many = [share for count, share in shares.items() if count > 2]
        if few and many:
            held = "held" if min(few) >= 0.2 and max(many) < max(few) else "did not hold"
            said = ", ".join(f"{share:.0%} of {count}" for count, share in shares.items())
            lines.append(f"- {kind}: the claim {held}; a bias gives back {said}.")
    return lines


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss by what is dropped, a line for each of the main arms."""
    shown = ("nothing", "bias", "rank 4", "rank 16", "rank 64")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        colors = colormaps["viridis"](np.linspace(0.15, 0.9, len(shown) - 1))
        for ax, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
            own = [row for row in rows if row["kind"] == kind]
            for name, color in zip(shown, [COLORS["pruned"], *colors], strict=True):
                losses = [row["losses"][name] for row in own]
                ax.plot([row["count"] for row in own], losses, color=color, marker="o", label=name)
            ax.set_xscale("log", base=2)
            ax.set_xticks([row["count"] for row in own], [f"{row['count']}" for row in own])
            ax.set_xlabel(f"{kind} sub-layers dropped")
        figure.axes[0].set_ylabel("held-out loss, nats per token")
        figure.axes[0].legend(frameon=False, title="in their place")
        save(figure, path)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a converted checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/depth_recovery"), help="for the text")
    sizes = {"samples": 16, "held_out": 8, "sequence": 512, "most": 8}
    arguments = sized_arguments(parser, sizes, {"samples": 2, "held_out": 2, "sequence": 32, "most": 1})
    bench = Bench(arguments.out, arguments.model, arguments)
    result: dict[str, Any] = describe() | {
        "model": arguments.model.name, "pattern": bench.arch.pattern, "hidden_size": bench.arch.hidden_size,
        "parameters": bench.arch.num_parameters(), "sequence": arguments.sequence, "ridge": RIDGE,
        "calibration_tokens": arguments.samples * arguments.sequence,
        "held_out_tokens": arguments.held_out * arguments.sequence, "original": bench.loss("valid"),
    }  # fmt: skip
    influence = bench.influence()
    rows: list[dict[str, Any]] = []
    folder = arguments.out if arguments.quick else RESULTS
    for count, (kind, letter) in product(COUNTS, KINDS.items()):
        order = sorted(bench.arch.layers.indices(letter), key=lambda unit: float(influence[unit]))
        if count > min(arguments.most, len(order) - 1):
            continue
        dropped, start = sorted(order[:count]), time.perf_counter()
        say = partial(print, f"{kind}, {count} fewer,", flush=True)
        losses, explained = arms(bench, dropped, say)
        seconds = time.perf_counter() - start
        rows.append({"kind": kind, "count": count, "losses": losses, "sublayers": explained, "seconds": seconds})
        write(result | {"rows": rows}, "depth_recovery", markdown(result | {"rows": rows}), folder)
        plot(rows, folder / "depth_recovery.png")


if __name__ == "__main__":
    main()
