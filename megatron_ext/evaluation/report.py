"""Reports: measured numbers to JSON, a page and pictures.

`write_report` is the demo's; `plot_training` and `plot_importance` serve every training and pruning job.  Losses are
in nats per token.  Every file is written beside its destination and renamed, so a reader never sees half of one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from megatron_ext.errors import DataError
from megatron_ext.evaluation.figures import (
    COLORS,
    GREY,
    MARKERS,
    STYLE,
    count,
    halo,
    label_ends,
    save,
    tick,
    write_text,
)
from megatron_ext.evaluation.results import finite

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


def plot_training(metrics: Path, out: Path) -> None:
    """Draw a job's `metrics.jsonl` (one JSON object per logged step) to a PNG.

    One panel for every loss (each key that ends in "loss"), then gradient norm, learning rate and tokens per second
    where they were logged.  Of a step that was logged twice, as after a resume, the last counts; a last line that a
    killed job left half-written is ignored.

    Raises:
        DataError: The file is missing, not JSON lines, or has no logged step.
    """
    rows = _read_metrics(metrics)
    losses = sorted({key for row in rows for key in row if key.endswith("loss")}, key=lambda key: (key != "loss", key))
    panels = [("loss, nats per token", losses)]
    for key, label in (
        ("grad_norm", "gradient norm"),
        ("learning_rate", "learning rate"),
        ("tokens_per_second", "tokens per second"),
    ):
        if any(key in row for row in rows):
            panels.append((label, [key]))
    colors = (COLORS["distilled"], COLORS["pruned"], COLORS["scratch"], "#CC79A7", COLORS["teacher"])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 2 + 1.6 * len(panels)), layout="constrained")
        heights = [2.2] + [1] * (len(panels) - 1)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (label, keys) in zip(axes, panels, strict=True):
            ends: list[tuple[float, float, str, str]] = []
            for i, key in enumerate(keys):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                color = colors[i % len(colors)] if ax is axes[0] else COLORS["teacher"]
                marker = "o" if len(points) < 40 else None
                ax.plot(x, y, color=color, marker=marker, markersize=3.5, linewidth=1.8 if ax is axes[0] else 1.2)
                ends.append((x[-1], y[-1], key.replace("_", " "), color))
            ax.set_title(label)
            if ax is axes[0]:
                label_ends(ax, ends)
        axes[0].margins(x=0.01)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        save(figure, out)


def plot_importance(scores: Mapping[str, ArrayLike], kept: Mapping[str, Sequence[int]], out: Path) -> None:
    """Draw importance scores as bars, what is kept in blue and what is dropped in orange, one panel per axis.

    Args:
        scores: 1-D scores per axis, any unit; for layers, Block Influence.
        kept: Indices that survive, per axis; an axis that is absent here is kept whole.
        out: The PNG.

    Up to 64 scores are drawn in their own order; more are sorted, largest first.
    """
    assert scores
    columns = min(3, len(scores))
    rows = math.ceil(len(scores) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(max(7.0, 4.2 * columns), 0.5 + 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, (name, values) in zip(axes, scores.items(), strict=False):
            heights = np.asarray(values, dtype=float)
            survives = np.zeros(len(heights), dtype=bool)
            survives[list(kept.get(name, range(len(heights))))] = True
            few = len(heights) <= 64
            order = np.arange(len(heights)) if few else np.argsort(-heights, kind="stable")
            colors = np.where(survives[order], COLORS["distilled"], COLORS["pruned"])
            _bars(ax, heights[order], 0.75 if few else 1.0, colors)
            ax.set_title(f"{name}: {survives.sum():,} of {len(heights):,} kept")
            ax.set_xlabel("index" if few else "rank, by importance")
            ax.grid(axis="x", visible=False)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in axes[len(scores) :]:
            ax.set_visible(False)
        axes[0].set_ylabel("importance")
        handles = [Patch(color=COLORS["distilled"], label="kept"), Patch(color=COLORS["pruned"], label="dropped")]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
        save(figure, out)


def _bars(ax: Axes, heights: Float[np.ndarray, " n"], width: float, colors: Shaped[np.ndarray, " n"]) -> None:
    """What `ax.bar` draws, as one object: a bar of its own for each of thousands of channels takes minutes."""
    left = np.arange(len(heights)) - width / 2
    x = np.stack([left, left, left + width, left + width], axis=1)
    y = heights[:, None] * np.array([0, 1, 1, 0])
    bars = PolyCollection(np.stack([x, y], axis=2), facecolors=colors, linewidths=0)  # type: ignore[arg-type]
    bars.sticky_edges.y.append(0)
    ax.add_collection(bars)
    ax.autoscale_view()


def plot_losses(models: Sequence[tuple[str, int, float]], out: Path) -> None:
    """Draw what each step of pruning costs.

    Args:
        models: Name, parameters and loss (nats per token) of the original and of what it became, in order.
        out: The PNG.
    """
    _, parameters, losses = zip(*models, strict=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        ax = figure.subplots()
        ax.plot(parameters, losses, color=COLORS["pruned"], marker="o")
        for number, (name, x, y) in enumerate(models):
            offset = (0, 8) if number else (0, -16)  # the line rises from the first
            ax.annotate(f"{name}: {y:.3f}", (x, y), xytext=offset, textcoords="offset points", ha="center")
        ax.invert_xaxis()  # pruning goes to the right
        ax.margins(x=0.2, y=0.2)
        ax.xaxis.set_major_formatter(FuncFormatter(tick))
        ax.set_xlabel("parameters")
        ax.set_ylabel("loss on the calibration data, nats per token")
        save(figure, out)


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


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order, one row per step."""
    if not path.is_file():
        raise DataError("no such metrics file", got=path, legal="a job's metrics.jsonl")
    lines = path.read_text().splitlines()
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["step"]] = rows.get(row["step"], {}) | row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError("not a logged step", got=f"{path}:{number}: {line[:80]}") from error
    if not rows:
        raise DataError("no step was logged", got=path)
    return [rows[step] for step in sorted(rows)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"
