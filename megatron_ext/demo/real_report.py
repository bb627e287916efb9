"""The report of `megatron-ext demo --real`: numbers to JSON, a page and a picture. Losses are in nats per token."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.demo.real_model import DISTILLED, METRICS, ORIGINAL, WITHOUT_MLPS, cut
from megatron_ext.reports.figures import COLORS, GREY, MARKERS, STYLE, count, save
from megatron_ext.reports.metrics_file import finite

_SECTIONS = ("texts", "settings", "versions", "machine")


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and `report.png`."""
    write_text(out / "report.json", json.dumps(finite(report), indent=2, allow_nan=False) + "\n")
    write_text(out / "report.md", render(report))
    with rc_context(STYLE):
        save(_draw(report), out / "report.png")


def headline(report: Mapping[str, Any]) -> str:
    """What a third of the attention costs, and what distillation gives back."""
    models = report["models"]
    original, cut_, distilled = (models[name]["loss"] for name in (ORIGINAL, report["best"], DISTILLED))
    gone = models[ORIGINAL]["attention"] - models[report["best"]]["attention"]
    lost, left = cut_ - original, distilled - original
    tokens = count(report["distillation"]["tokens"])
    won = f"{(lost - left) / lost:.0%} of that back" if lost > 0 and left < lost else "none of that back"
    which = f"Without {gone} of {models[ORIGINAL]['attention']} attention sub-layers SmolLM2-135M"
    return f"{which} is {lost:.2f} nats worse; distillation on {tokens} tokens brings {won}"


def rows(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Each model: its directory, what it is for people, and its numbers."""
    total = report["models"][ORIGINAL]
    titles = {ORIGINAL: "SmolLM2-135M-Instruct"}
    for metric in METRICS:
        gone = total["attention"] - report["models"][cut(metric)]["attention"]
        titles[cut(metric)] = f"without {gone} attention sub-layers, by {metric.replace('_', ' ')}"
    gone = total["mlps"] - report["models"][WITHOUT_MLPS]["mlps"]
    titles[WITHOUT_MLPS] = f"without {gone} MLPs, by {METRICS[0].replace('_', ' ')}"
    titles[DISTILLED] = f"distilled, after the cut {report['best'].replace('-', ' ')}"
    return [(name, title, report["models"][name]) for name, title in titles.items()]


def render(report: Mapping[str, Any]) -> str:
    """The page."""
    measured = report["measured"]
    lines = ["# A real model: what was measured", "", f"**{headline(report)}.**", ""]
    lines += ["![Losses of the models, and which sub-layers each metric dropped](report.png)", ""]
    lines += ["| model | parameters | attention | MLPs | KV cache per token | nats per token | bits per byte |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for _, title, row in rows(report):
        lines.append(
            f"| {title} | {row['params']:,} | {row['attention']} | {row['mlps']} | "
            f"{row['cache_bytes_per_token'] / 1024:.1f} KiB | {row['loss']:.3f} | {row['bits_per_byte']:.3f} |"
        )
    taught = report["distillation"]
    lines += [
        "",
        f"Measured on {measured['tokens']:,} tokens that no step has trained on, in windows of {measured['window']}. "
        f"Distillation: forward KL to the original on {taught['tokens']:,} tokens, {taught['seconds']:.0f} s.",
        "One run with one seed, on little text of one kind: how far another text moves these numbers was not measured.",
    ]
    lines += ["", "## Chat", ""]
    for place, asked in enumerate(report["answers"][ORIGINAL]):
        lines += [f"**{asked['prompt']}**", ""]
        lines += [f"- {name}: {_one_line(answers[place]['text'])}" for name, answers in report["answers"].items()]
        lines += [""]
    lines += ["## What the steps took", ""]
    lines += [f"- {title}: {seconds:.0f} s" for title, seconds in report["seconds"].items()]
    lines += [f"- in all: {sum(report['seconds'].values()) / 60:.1f} minutes"]
    lines += ["", "## Layers", ""]
    lines += [f"- {name}: `{row['pattern']}`" for name, _, row in rows(report)]
    for section in _SECTIONS:
        lines += ["", f"## {section.capitalize()}", ""]
        lines += [f"- {key}: {value}" for key, value in report[section].items()]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _draw(report: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0, 0.99, 0.92))  # type: ignore[union-attr]
    figure.text(0.014, 0.955, headline(report), size=11.5, weight="bold", va="center")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _draw_losses(left, report)
    _draw_kept(right, report)
    return figure


def _draw_losses(ax: Axes, report: Mapping[str, Any]) -> None:
    kinds = {ORIGINAL: "teacher", DISTILLED: "distilled", WITHOUT_MLPS: "scratch"}
    shown = sorted(rows(report), key=lambda row: -row[2]["loss"])
    for place, (name, title, row) in enumerate(shown):
        kind = kinds.get(name, "pruned")
        ax.plot(row["loss"], place, MARKERS[kind], color=COLORS[kind], markersize=9, clip_on=False, zorder=5)
        ax.annotate(f"{row['loss']:.3f}", (row["loss"], place), (0, 9), textcoords="offset points", ha="center",
                    color=COLORS[kind], weight="bold")  # fmt: skip
        ax.text(0.0, place - 0.38, title, transform=ax.get_yaxis_transform(), va="center", size=8.5, color=GREY)
    losses = [row["loss"] for _, _, row in shown if math.isfinite(row["loss"])]
    ax.set_xlim(0, 1.1 * max(losses))
    ax.set_ylim(-0.7, len(shown) - 0.3)
    ax.set_yticks([])
    ax.set_title("Nats per token on text that was held out")
    ax.set_xlabel("nats per token")
    ax.grid(visible=False, axis="y")


def _draw_kept(ax: Axes, report: Mapping[str, Any]) -> None:
    """A square for each layer of the original, filled if its sub-layer stayed."""
    cuts = [(cut(metric), metric.replace("_", " "), 0) for metric in METRICS]
    cuts.append((WITHOUT_MLPS, f"MLPs, {METRICS[0].replace('_', ' ')}", 1))
    for row, (name, _, kind) in enumerate(reversed(cuts)):
        kept: Sequence[int] = report["models"][name]["kept"]
        layers = len(report["models"][ORIGINAL]["pattern"]) // 2
        color = COLORS["scratch" if kind else "pruned"]
        gone = [layer for layer in range(layers) if 2 * layer + kind not in kept]
        stay = [layer for layer in range(layers) if 2 * layer + kind in kept]
        ax.plot(stay, [row] * len(stay), "s", markersize=7, color="#DDDDDD")
        ax.plot(gone, [row] * len(gone), "s", markersize=7, color=color)
    ax.set_yticks(range(len(cuts)), [title for _, title, _ in reversed(cuts)])
    ax.set_ylim(-0.8, len(cuts) - 0.2)
    ax.set_title("Sub-layers that were dropped, by metric (filled)")
    ax.set_xlabel("layer of the original, from 0")
    ax.grid(visible=False)
