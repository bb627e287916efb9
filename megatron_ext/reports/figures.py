"""How every picture looks, and how it gets to disk: beside its destination and renamed, so nobody reads half of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from megatron_ext.checkpoint.atomic import atomic_write

# Okabe and Ito's palette, safe for colour-blind readers; ink and grey for what carries no data.
COLORS = {"teacher": "#3B3B3B", "pruned": "#D55E00", "distilled": "#0072B2", "scratch": "#009E73"}
MARKERS = {"teacher": "s", "pruned": "X", "distilled": "o", "scratch": "D"}
INK, GREY = "#222222", "#8A8A8A"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, text, colour) right of its point, moved up or down where two would overlap."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    # Settle the limits and the layout that the distances below are measured in.
    if figure.get_layout_engine() is None:
        ax.autoscale_view()
    else:
        figure.draw_without_rendering()
    height = 14 * figure.dpi / 72
    placed: list[tuple[float, float]] = []
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        left, bottom = ax.transData.transform((x, y))
        wanted = bottom
        for other_left, other in placed:  # ascending, so that one pass is enough
            if abs(left - other_left) < 120 and wanted - other < height:
                wanted = other + height
        placed.append((left, wanted))
        shift = (wanted - bottom) * 72 / figure.dpi
        halo(
            ax.annotate(
                text,
                (x, y),
                (9, shift),
                textcoords="offset points",
                color=color,
                weight="bold",
                va="center",
                annotation_clip=False,
                zorder=6,
            )
        )


def halo(text: Any) -> None:
    """A white rim, so that a label stays legible on a line."""
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def count(value: float) -> str:
    """1234567 as "1.23 M"."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def tick(value: float, _: int) -> str:
    return count(value) if value else "0"


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")
