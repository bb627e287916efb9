"""The picture of a training: its losses, gradient norm, learning rate and speed over the steps."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_ext.errors import DataError
from megatron_ext.reports.figures import COLORS, STYLE, label_ends, save
from megatron_ext.reports.metrics_file import read_metrics

FILE = "metrics.png"
WIDTH = 8.0
"""Of the picture, in inches."""


def plot_training(metrics: Path, out: Path, unit: str = "nats per token") -> None:
    """Draw a job's `metrics.jsonl` (one JSON object per logged step) to a PNG.

    One panel for every loss (each key that ends in "loss"), then gradient norm, learning rate and tokens per second
    where they were logged.  Of a step that was logged twice, as after a resume, the last counts; a last line that a
    killed job left half-written is ignored.

    Raises:
        DataError: The file is missing, not JSON lines, or has no logged step.
    """
    rows = read_metrics(metrics)
    if not rows:
        raise DataError("no step was logged", got=metrics)
    losses = sorted({key for row in rows for key in row if key.endswith("loss")}, key=lambda key: (key != "loss", key))
    panels = [(f"loss, {unit}", losses)]
    for key, label in (
        ("grad_norm", "gradient norm"),
        ("learning_rate", "learning rate"),
        ("tokens_per_second", "tokens per second"),
        ("samples_per_second", "samples per second"),
    ):
        if any(key in row for row in rows):
            panels.append((label, [key]))
    colors = (COLORS["distilled"], COLORS["pruned"], COLORS["scratch"], "#CC79A7", COLORS["teacher"])
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2 + 1.6 * len(panels)))
        # Margins in inches: a layout engine would draw everything three times, and here it is known what stands where.
        right = 0.15 + 0.09 * max(map(len, losses), default=0)
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.8 / WIDTH, right=1 - right / WIDTH, bottom=0.5 / height, top=1 - 0.35 / height)
        heights = [2.2] + [1] * (len(panels) - 1)
        axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, height_ratios=heights, gridspec_kw={"hspace": 0.45}
        )[:, 0]
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
