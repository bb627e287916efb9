"""The picture of `megatron-ext compare`: a panel for each thing that was measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_ext.evaluation.compare_rows import validation_differences, validation_units
from megatron_ext.evaluation.measure import Panel, kinds
from megatron_ext.evaluation.measured_run import VALIDATION, Run
from megatron_ext.evaluation.panels import look, over_length, over_parameters, title
from megatron_ext.evaluation.rows import note
from megatron_ext.models import cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.figures import STYLE, save

CONTEXTS = [2**k for k in range(8, 18)]


def plot_comparison(runs: Sequence[Run], out: Path) -> None:
    """Draw what at least one of the runs has.

    Args:
        runs: The runs; each keeps its colour in all panels.
        out: The PNG.
    """
    panels = _panels(runs)
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.4 + 4.2 * columns, 0.7 + 3.1 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax, (title, draw) in zip(axes, panels, strict=False):
            draw(ax, runs)
            ax.set_title(title)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
        save(figure, out)


def _panels(runs: Sequence[Run]) -> list[Panel]:
    patterns = all(isinstance(run.model, Architecture) for run in runs)
    panels: list[Panel] = [("memory in 16 bits, one sequence", _memory)] if patterns else []
    unequal = note(validation_differences(runs), values=False)
    if any(run.validation for run in runs):
        for name, unit in validation_units(runs).items():
            heading = title(f"validation {name.replace('_', ' ')}, {unit}{unequal}")
            panels.append((heading, partial(over_parameters, section=VALIDATION, metric=name)))
    return [*panels, *(panel for kind in kinds() for panel in kind.panels(runs))]


def _memory(ax: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        sizes = [cost.memory_bytes(run.architecture, cost.Workload(1, length)) for length in CONTEXTS]
        ax.plot(CONTEXTS, sizes, label=run.name, **look(number))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e9:g} GB" if y >= 1e9 else f"{y / 1e6:g} MB"))
    over_length(ax, CONTEXTS)
