"""What the panels of a comparison's picture have in common."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_ext.evaluation.measured_run import Run
from megatron_ext.reports.figures import tick

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#3B3B3B", "#8A6D3B")
MARKERS = "osD^vXPh"


def title(words: str) -> str:
    """A panel's title; what is said in brackets on a line of its own."""
    return words.replace(" (", "\n(")


def look(number: int) -> dict[str, Any]:
    """How a run is drawn, by its place in the comparison."""
    marker = MARKERS[number % len(MARKERS)]
    return {"color": PALETTE[number % len(PALETTE)], "marker": marker, "markersize": 4, "linewidth": 1.6}


def over_length(ax: Axes, lengths: Sequence[int]) -> None:
    """Let the horizontal axis be tokens of context, in powers of two."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths if len(lengths) < 6 else lengths[::2])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("tokens of context")


def over_parameters(ax: Axes, runs: Sequence[Run], section: str, metric: str) -> None:
    """Draw a metric of a section of each run's results over its parameters."""
    for number, run in enumerate(runs):
        value = run.results.get(section, {}).get(metric)
        if value is not None:
            ax.plot(run.parameters, value, label=run.name, **{**look(number), "markersize": 8})
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.margins(0.2)
    ax.set_xlabel("parameters")
