"""The demo's report: measured numbers to JSON, a page and a picture. Losses are in nats per token."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.errors import DataError
from megatron_ext.reports.figures import COLORS, GREY, MARKERS, STYLE, count, halo, label_ends, save, tick
from megatron_ext.reports.metrics_file import finite

VARIANTS = ("teacher", "pruned", "distilled", "scratch")
MEASURED = ("params", "non_embedding_params", "val_loss", "tokens", "seconds", "tokens_per_second", "pattern")
TIE = 0.005  # nats: closer than this is called equal


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and `report.png` to `directory`, which is created if need be.

    Args:
        directory: Where to; earlier reports there are replaced.
        report: One mapping each under "teacher", "pruned", "distilled" and "scratch" with `params`,
            `non_embedding_params`, `val_loss` (nats per token), `tokens` (trained on), `seconds`, `tokens_per_second`,
            `pattern` and optionally `history` (a list of `{"tokens", "val_loss", "loss"}`); anything else that is
            JSON ("versions", "machine", "flags", ...) is kept and, where it is a mapping, listed on the page.

    Raises:
        DataError: A variant or one of its numbers is missing.
    """
    for name in VARIANTS:
        missing = [key for key in MEASURED if key not in report.get(name, {})]
        if missing:
            raise DataError("the report lacks measurements", got=f"{name} without {', '.join(missing)}")
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "report.json", json.dumps(finite(report), indent=2, allow_nan=False) + "\n")
    write_text(directory / "report.md", render_markdown(report))
    with rc_context(STYLE):
        save(_draw_report(report), directory / "report.png")


def headline(report: Mapping[str, Any]) -> str:
    """The one sentence the experiment was run for: the distilled model against the same one trained from scratch."""
    distilled, scratch = report["distilled"], report["scratch"]
    losses = f"{distilled['val_loss']:.3f} against {scratch['val_loss']:.3f} nats per token"
    if distilled["tokens"] == scratch["tokens"]:
        budget = f"at equal tokens ({count(distilled['tokens'])})"
    else:
        budget = f"at unequal tokens ({count(distilled['tokens'])} against {count(scratch['tokens'])})"
    gain = scratch["val_loss"] - distilled["val_loss"]
    if not math.isfinite(gain):
        return f"Distilled and scratch cannot be compared, a run diverged: {losses}"
    if abs(gain) < TIE:
        return f"Distilled and scratch are equal within {TIE} nats {budget}: {losses}"
    return f"Distilled is {abs(gain):.2f} nats {'better' if gain > 0 else 'worse'} than scratch {budget}: {losses}"


def render_markdown(report: Mapping[str, Any]) -> str:
    """The page: headline, what each step did, the table, and under what conditions it was measured."""
    teacher, pruned, distilled, scratch = (report[name] for name in VARIANTS)
    lines = ["# Train, prune, distil: what was measured", "", f"**{headline(report)}.**", ""]
    cut = 1 - pruned["params"] / teacher["params"]
    lines.append(
        f"- Pruning took {cut:.0%} of the parameters ({count(teacher['params'])} to {count(pruned['params'])}) "
        f"and moved the validation loss from {teacher['val_loss']:.3f} to {pruned['val_loss']:.3f} nats per token."
    )
    lost, left = pruned["val_loss"] - teacher["val_loss"], distilled["val_loss"] - teacher["val_loss"]
    step = f"- Distillation on {count(distilled['tokens'])} tokens moved it to {distilled['val_loss']:.3f}"
    if lost > TIE:
        won = (lost - left) / lost
        step += f": {won:.0%} of the loss won back" if won >= 0 else ": worse than before it"
    lines.append(step + (", and below the teacher's." if left < -TIE else "."))
    lines.append(
        f"- Equal tokens are not equal work: distillation also runs the teacher ({distilled['seconds']:.0f} s "
        f"against {scratch['seconds']:.0f} s from scratch) and builds on the {count(teacher['tokens'])} tokens "
        "that the teacher was trained on."
    )
    lines.append("- One run of each with one seed: how far another seed moves these numbers was not measured.")
    lines += ["", "![Validation loss over tokens, and against parameters](report.png)", ""]
    lines.append(
        "| model | parameters | without embeddings | validation loss | perplexity | tokens | seconds | tokens/s |"
    )
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in VARIANTS:
        row = report[name]
        perplexity = f"{math.exp(row['val_loss']):.1f}" if row["val_loss"] < 100 else "-"
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-"
        lines.append(
            f"| {name} | {row['params']:,} | {row['non_embedding_params']:,} | {row['val_loss']:.3f} | {perplexity} "
            f"| {row['tokens']:,} | {row['seconds']:.0f} | {speed} |"
        )
    lines += ["", f"Validation loss in nats per token{_measured_on(report)}  Tokens: what that step trained on."]
    lines += ["", "## Layers", ""]
    lines += [f"- {name}: `{report[name]['pattern']}`" for name in VARIANTS]
    for section, content in report.items():
        if section not in VARIANTS and isinstance(content, Mapping) and content:
            lines += ["", f"## {section.capitalize()}", ""]
            lines += [f"- {key}: {_plain(value)}" for key, value in content.items()]
    return "\n".join(lines) + "\n"


def _measured_on(report: Mapping[str, Any]) -> str:
    """On which tokens the losses were measured, as far as the report says."""
    found = report.get("validation", {})
    if None in (found.get(name) for name in ("split", "tokens", "tokens while training")):
        return "."
    return (
        f", of all {found['tokens']:,} tokens of the {found['split']} split.  While they train, models are measured "
        f"on {found['tokens while training']:,} of them, whose loss is another: those are the lines of the picture and "
        "`metrics.jsonl`."
    )


def _draw_report(report: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout=ConstrainedLayoutEngine(rect=(0.005, 0, 0.99, 0.87)))
    title, _, losses = headline(report).partition(": ")
    figure.text(0.014, 0.955, title, size=13, weight="bold", va="center")
    figure.text(0.014, 0.905, losses, size=10, color=GREY, va="center")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    _draw_losses(left, report)
    _draw_sizes(right, report)
    return figure


def _draw_losses(ax: Axes, report: Mapping[str, Any]) -> None:
    ends: list[tuple[float, float, str, str]] = []
    pruned = report["pruned"]["val_loss"]
    for name in ("teacher", "scratch", "distilled"):
        row, color = report[name], COLORS[name]
        points = {point["tokens"]: point["val_loss"] for point in row.get("history", ()) if point.get("val_loss")}
        drawn = sorted((tokens, loss) for tokens, loss in points.items() if math.isfinite(loss))
        if drawn:
            ax.plot(*zip(*drawn, strict=True), color=color, marker=".", markersize=3.5, clip_on=False)
        # A training measures on a part of the split, so that what was measured on all of it is no point of its curve.
        if math.isfinite(end := row["val_loss"]):
            ax.plot(row["tokens"], end, MARKERS[name], color=color, markersize=7, clip_on=False, zorder=5)
            ends.append((row["tokens"], end, f"{name} {end:.3f}", color))
    right = max(report[name]["tokens"] for name in VARIANTS)
    ax.set_xlim(0, right)
    if math.isfinite(pruned):
        color = COLORS["pruned"]
        ax.axhline(pruned, color=color, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
        ax.plot(0, pruned, MARKERS["pruned"], color=color, markersize=10, clip_on=False, zorder=5)
        ends.append((right, pruned, f"just pruned {pruned:.3f}", color))
    ax.set_title("Validation loss while training (lines), and on the whole split")
    ax.set_xlabel("tokens this model was trained on")
    ax.set_ylabel("validation loss, nats per token")
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    label_ends(ax, ends)


def _draw_sizes(ax: Axes, report: Mapping[str, Any]) -> None:
    at = {name: (report[name]["params"], report[name]["val_loss"]) for name in VARIANTS}
    at = {name: (x, y) for name, (x, y) in at.items() if math.isfinite(y)}
    steps = (("teacher", "pruned", "prune", 0.0), ("pruned", "distilled", "distil", 0.4))
    steps = [step for step in steps if step[0] in at and step[1] in at]
    for start, end, _, bend in steps:
        line = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2, "shrinkA": 8, "shrinkB": 7}
        ax.annotate("", at[end], at[start], arrowprops=line | {"connectionstyle": f"arc3,rad={bend}"})
    for name, (x, y) in at.items():
        hollow = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.8} if name == "scratch" else {}
        ax.plot(x, y, MARKERS[name], **({"color": COLORS[name], "markersize": 8, "zorder": 5} | hollow))
    ax.set_xlim(0, 1.15 * max(report[name]["params"] for name in VARIANTS))
    ax.margins(y=0.1)
    ax.set_title("Validation loss against size")
    ax.set_xlabel("parameters, embeddings included")
    ax.set_ylabel("validation loss, nats per token")
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    label_ends(ax, [(x, y, f"{name} {y:.3f}", COLORS[name]) for name, (x, y) in at.items()])
    for start, end, word, bend in steps:
        (x0, y0), (x1, y1) = ax.transData.transform((at[start], at[end]))
        x, y = ax.transData.inverted().transform(((x0 + x1) / 2 - bend / 2 * abs(y1 - y0), (y0 + y1) / 2))
        halo(ax.text(x, y, word, color=GREY, style="italic", ha="center", va="center"))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"
