"""What each distillation loss and a corrected teacher are worth: equal student, equal tokens.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/distillation_losses.py

A small hybrid is trained on the Python standard library and cut to half its parameters; the half is then trained in
each way on the same tokens of the same text. The same is done on text that the teacher has not seen, the C++ headers
that torch ships, with and without teacher correction. Writes results/distillation_losses.{json,md,png}; what is trained
is kept in --out and used again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import small_model
import torch
from machine import describe, sized_arguments, write
from small_model import BATCH, MODEL, PROCESSES, ROOT, SEQUENCE

from megatron_ext.checkpoint import layout
from megatron_ext.data.corpus import build_dataset
from megatron_ext.reports.metrics_file import read_metrics

HEADERS = Path(torch.__file__).parent / "include" / "ATen"
HEADER_BYTES = 6_000_000


@dataclass(frozen=True)
class Arm:
    """One way of training the half.

    Attributes:
        name: For the table.
        text: `library` or `headers`.
        flags: Of `distill_gpt.py`; None for plain pre-training.
        pruned: Whether it begins with the pruned weights, or at random.
    """

    name: str
    text: str
    flags: tuple[str, ...] | None
    pruned: bool = True


LOSSES = {
    "forward KL": (),
    "reverse KL": ("--distill-loss", "reverse-kl"),
    "JSD": ("--distill-loss", "jsd"),
    "MSE of logits": ("--distill-loss", "mse"),
    "cosine of logits": ("--distill-loss", "cosine"),
    "forward KL + cross entropy": ("--distill-kd-weight", "0.5", "--distill-ce-weight", "0.5"),
    "forward KL + states": ("--distill-states", "all"),
}
CORRECTIONS = {
    "forward KL, teacher corrected first": ("--distill-correct-teacher", "first"),
    "forward KL, teacher corrected together": ("--distill-correct-teacher", "together"),
}
PLAIN = {"from scratch": False, "cross entropy": True}
ARMS = [
    *(Arm(name, "library", None, pruned) for name, pruned in PLAIN.items()),
    *(Arm(name, "library", flags) for name, flags in LOSSES.items()),
    *(Arm(name, "headers", None, pruned) for name, pruned in PLAIN.items()),
    Arm("forward KL", "headers", ()),
    *(Arm(name, "headers", flags) for name, flags in CORRECTIONS.items()),
]


class Bench:
    """The data, the teacher and the half, in a folder."""

    def __init__(self, out: Path, arguments: argparse.Namespace) -> None:
        self.out, self.steps = out, arguments.train_iters
        tokenizer = out / "text" / "tokenizer"
        for name, inputs in {"text": None, "headers": [HEADERS]}.items():
            if not (out / name / "manifest.json").is_file():
                build_dataset(
                    out / name, inputs, tokenizer if inputs else None, max_bytes=HEADER_BYTES if inputs else None
                )
        self.teacher = out / f"teacher-{arguments.teacher_iters}"
        if not self._has(self.teacher, arguments.teacher_iters):
            self._run("pretrain_hybrid.py", self.teacher, arguments.teacher_iters, *MODEL, *self._data("library"))
        self.half = out / f"half-{arguments.teacher_iters}"
        if not self.half.is_dir():
            flags = ["--load", str(self.teacher), "--prune-target-params", "0.5", "--save", str(self.half)]
            command = [str(ROOT / "prune_gpt.py"), *flags, *self._data("library")]
            small_model.torchrun(command, out / "logs" / "prune.log")

    def train(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train an arm, unless that is done, and measure it."""
        run = self.out / f"{arm.text} {arm.name} {seed}".replace(",", "").replace(" ", "-")
        flags = ["--seed", str(seed), *self._data(arm.text)]
        flags += ["--pretrained-checkpoint" if arm.pruned else "--preset", str(self.half)]
        script = "pretrain_hybrid.py"
        if arm.flags is not None:
            script, flags = "distill_gpt.py", [*flags, "--distill-teacher", str(self.teacher), *arm.flags]
        if not self._has(run, self.steps):
            self._run(script, run, self.steps, *flags)
        steps = read_metrics(run / "metrics.jsonl")
        return {
            "arm": arm.name, "text": arm.text, "seed": seed, "tokens": int(steps[-1]["tokens"]),
            "seconds": round(sum(step["seconds"] for step in steps), 1), "val_loss": self.loss(run, arm.text),
            "curve": [[step["tokens"], step["val_loss"]] for step in steps if "val_loss" in step],
        }  # fmt: skip

    def loss(self, model: Path, text: str) -> float:
        """Nats per token on the whole held-out part of a text."""
        run = self.out / "losses" / f"{model.name}-on-{text}"
        if not (run / "results.json").is_file():
            flags = ["--pretrained-checkpoint", str(model), "--skip-train", "--save", str(run), *self._data(text)]
            small_model.torchrun([str(ROOT / "pretrain_hybrid.py"), *flags], self.out / "logs" / f"{run.name}.log")
        return json.loads((run / "results.json").read_text())["val_loss"]

    def _data(self, text: str) -> list[str]:
        folder = self.out / ("text" if text == "library" else text)
        return [*small_model.data_flags(self.out, BATCH // PROCESSES), "--data-path", str(folder / "text_document")]

    def _run(self, script: str, run: Path, steps: int, *flags: str) -> None:
        schedule = [*small_model.schedule(steps), "--eval-interval", str(max(1, steps // 6))]
        command = [str(ROOT / script), *flags, *schedule, "--load", str(run), "--save", str(run)]
        small_model.torchrun(command, self.out / "logs" / f"{run.name}.log")

    def _has(self, run: Path, step: int) -> bool:
        return (run / f"iter_{step:07d}" / "metadata.json").is_file()


def mean(rows: Sequence[dict], **where: str) -> float:
    """The mean loss of an arm over its seeds."""
    return statistics.mean(row["val_loss"] for row in rows if all(row[key] == value for key, value in where.items()))


def claims(rows: Sequence[dict]) -> dict[str, str]:
    """What the papers say, and whether it held here."""
    others = {name: mean(rows, text="library", arm=name) for name in [*PLAIN, *LOSSES] if name != "forward KL"}
    alone = mean(rows, text="library", arm="forward KL")
    best = min(others, key=lambda name: others[name])
    plain = mean(rows, text="headers", arm="forward KL")
    helped = {name: mean(rows, text="headers", arm=name) for name in CORRECTIONS}
    return {
        "KL on the logits alone is the best loss (Minitron, arXiv 2407.14679)": _verdict(
            alone < others[best], f"{alone:.4f} against {others[best]:.4f} of the best other, {best}"
        ),
        "teacher correction helps on data that the teacher has not seen (arXiv 2408.11796)": _verdict(
            all(value < plain for value in helped.values()),
            f"{plain:.4f} without, " + ", ".join(f"{value:.4f} {name.split()[-1]}" for name, value in helped.items()),
        ),
    }


def _verdict(held: bool, numbers: str) -> str:
    return ("held" if held else "did not hold") + f": {numbers}"


def markdown(report: dict[str, Any]) -> str:
    """The table, and the claims."""
    lines = [
        f"Held-out loss of a half ({report['half']:,} parameters) of a hybrid of {report['teacher']:,} after "
        f"{report['tokens']:,} tokens, nats per token; {len(report['seeds'])} seed(s), {report['machine']}.", "",
    ]  # fmt: skip
    for text, what in (("library", "the teacher's own text"), ("headers", "text that the teacher has not seen")):
        known = [("not measured" if x is None else f"{x:.4f}") for x in report["losses"][text].values()]
        lines += [f"### On {what}", "", f"Teacher {known[0]}, the half before training {known[1]}.", ""]
        lines += ["| trained with | loss | seconds |", "| --- | ---: | ---: |"]
        names = dict.fromkeys(row["arm"] for row in report["rows"] if row["text"] == text)
        for name in sorted(names, key=lambda name: mean(report["rows"], text=text, arm=name)):
            times = [row["seconds"] for row in report["rows"] if (row["text"], row["arm"]) == (text, name)]
            lines.append(f"| {name} | {mean(report['rows'], text=text, arm=name):.4f} | {statistics.mean(times):.0f} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {claim}: {verdict}." for claim, verdict in report["claims"].items())])


def plot(report: dict[str, Any], path: Path) -> None:
    """Held-out loss over tokens, one panel for each text, each curve named at its end."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    titles = {"library": "the teacher's own text", "headers": "text the teacher has not seen"}
    for panel, text in zip(panels, titles, strict=True):
        rows = [row for row in report["rows"] if row["text"] == text and row["seed"] == report["seeds"][0]]
        for color, row in zip(plt.get_cmap("tab10").colors, rows, strict=False):  # type: ignore[attr-defined]
            tokens, losses = zip(*row["curve"], strict=True)
            panel.plot(
                tokens, losses, color=color, label=f"{row['arm']} ({row['val_loss']:.3f})", marker="o", markersize=3
            )
        panel.set(title=f"On {titles[text]}", xlabel="tokens", ylabel="held-out loss, nats per token")
        panel.set_ylim(top=sorted(value for row in rows for _, value in row["curve"])[-2])
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_distillation"), help="default: %(default)s")
    sizes = {"teacher-iters": 600, "train-iters": 150, "seeds": 1}
    quick = {"teacher-iters": 12, "train-iters": 6, "seeds": 1}
    arguments = sized_arguments(parser, sizes, quick)
    machine, bench = describe(), Bench(arguments.out.absolute(), arguments)
    seeds = [1234 + i for i in range(arguments.seeds)]
    rows = [bench.train(arm, seed) for seed in seeds for arm in ARMS]
    sizes_of = [layout.architecture(layout.find(model).path).num_parameters() for model in (bench.teacher, bench.half)]
    report = machine | {
        "teacher": sizes_of[0], "half": sizes_of[1], "tokens": rows[0]["tokens"], "seeds": seeds,
        "settings": {
            "sequence": SEQUENCE, "batch": BATCH, "steps": bench.steps, "teacher_steps": arguments.teacher_iters,
        },
        "losses": {
            text: {"teacher": bench.loss(bench.teacher, text), "half": bench.loss(bench.half, text)}
            for text in ("library", "headers")
        },
        "rows": rows, "claims": claims(rows),
    }  # fmt: skip
    folder = arguments.out if arguments.quick else Path(__file__).parent / "results"
    write(report, "distillation_losses", markdown(report), folder)
    plot(report, folder / "distillation_losses.png")


if __name__ == "__main__":
    main()
