"""Pictures of a pruning job: what is kept of each axis by importance, and what each step costs in loss."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from megatron_ext.reports.figures import COLORS, GREY, STYLE, save, tick

FAR = 3  # times the second highest


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
            _cut_off(ax, heights[order])
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


def _cut_off(ax: Axes, heights: Float[np.ndarray, " n"]) -> None:
    """Let a bar far above all others run out of the picture, with its value, so that they can be told apart."""
    *_, second, most = (0.0, 0.0, *np.sort(heights))
    if second <= 0 or most < FAR * second:
        return
    ax.set_ylim(top=1.25 * second)
    place = int(np.argmax(heights))
    ax.annotate(f"{most:.3g}", (place, 1.2 * second), xytext=(8, 0), textcoords="offset points", va="center")


def _bars(ax: Axes, heights: Float[np.ndarray, " n"], width: float, colors: Shaped[np.ndarray, " n"]) -> None:
    """What `ax.bar` draws, as one object: a bar of its own for each of thousands of channels takes minutes."""
    left = np.arange(len(heights)) - width / 2
    x = np.stack([left, left, left + width, left + width], axis=1)
    y = heights[:, None] * np.array([0, 1, 1, 0])
    bars = PolyCollection(np.stack([x, y], axis=2), facecolors=colors, linewidths=0)  # type: ignore[arg-type]
    bars.sticky_edges.y.append(0)
    ax.add_collection(bars)
    ax.autoscale_view()


def plot_losses(models: Sequence[tuple[str, int, float]], out: Path, per: str = "token") -> None:
    """Draw what each step of pruning costs.

    Args:
        models: Name, parameters and loss (nats) of the original and of what it became, in order.
        out: The PNG.
        per: What the loss is the mean over.
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
        ax.set_ylabel(f"loss on the calibration data, nats per {per}")
        save(figure, out)


def plot_explained(curves: Mapping[str, Float[np.ndarray, " d"]], rank: int, out: Path) -> None:
    """Draw what linear maps of each rank explain of the update of each dropped sub-layer.

    Args:
        curves: By sub-layer, the share of its variance for each rank from 0.
        rank: That of the maps which were taken.
        out: The PNG.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.subplots()
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
        for (name, curve), color in zip(curves.items(), colors, strict=True):
            ax.plot(np.arange(1, len(curve)), curve[1:], color=color, linewidth=1.5, label=name)
        ax.axvline(rank, color=GREY, linewidth=1, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("rank of a linear map")
        ax.set_ylabel("explained variance of the update")
        if len(curves) <= 16:
            figure.legend(loc="outside right upper", frameon=False, title="sub-layer")
        save(figure, out)
