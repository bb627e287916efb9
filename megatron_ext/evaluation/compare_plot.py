"""The picture of `megatron-ext compare`: a panel for each thing that was measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from megatron_ext.evaluation.compare_rows import (
    note,
    task_differences,
    task_results,
    text_differences,
    validation_differences,
    validation_units,
)
from megatron_ext.evaluation.measured_run import VALIDATION, Run
from megatron_ext.models import cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.figures import STYLE, save, tick

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#3B3B3B", "#8A6D3B")
MARKERS = "osD^vXPh"
CONTEXTS = [2**k for k in range(8, 18)]
Panel = tuple[str, Callable[[Axes, Sequence[Run]], None]]


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
    validation = validation_differences(runs)
    for what, unequal, section, metric in (
        ("bits per byte", text_differences(runs), "text", "bits_per_byte"),
        *(
            (f"validation {name.replace('_', ' ')}, {unit}", validation, VALIDATION, name)
            for name, unit in validation_units(runs).items()
        ),
    ):
        if any(run.results.get(section) for run in runs):
            title = what + note(unequal, values=False).replace(" (", "\n(")
            panels.append((title, lambda ax, runs, at=(section, metric): _quality(ax, runs, *at)))
    if any(run.results.get("synthetic") for run in runs):
        panels.append(("synthetic suites, mean accuracy", _synthetic))
    if any(run.results.get("tasks") for run in runs):
        panels.append(("tasks", _tasks))
    if any(run.results.get("speed") for run in runs):
        for what in ("prefill", "decode"):
            panels.append((f"{what}, tokens per second", lambda ax, runs, what=what: _speed(ax, runs, what)))
    return panels


def _look(number: int) -> dict[str, Any]:
    marker = MARKERS[number % len(MARKERS)]
    return {"color": PALETTE[number % len(PALETTE)], "marker": marker, "markersize": 4, "linewidth": 1.6}


def _over_length(ax: Axes, lengths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths if len(lengths) < 6 else lengths[::2])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("tokens of context")


def _memory(ax: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        sizes = [cost.memory_bytes(run.architecture, cost.Workload(1, length)) for length in CONTEXTS]
        ax.plot(CONTEXTS, sizes, label=run.name, **_look(number))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e9:g} GB" if y >= 1e9 else f"{y / 1e6:g} MB"))
    _over_length(ax, CONTEXTS)


def _quality(ax: Axes, runs: Sequence[Run], section: str, metric: str) -> None:
    for number, run in enumerate(runs):
        value = run.results.get(section, {}).get(metric)
        if value is not None:
            ax.plot(run.parameters, value, label=run.name, **{**_look(number), "markersize": 8})
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.margins(0.2)
    ax.set_xlabel("parameters")


def _synthetic(ax: Axes, runs: Sequence[Run]) -> None:
    """Of each length the mean over those suites that all runs were asked at it."""
    measured = [(number, run.results["synthetic"]) for number, run in enumerate(runs) if run.results.get("synthetic")]
    shared = set.intersection(*({(suite, length) for suite in own for length in own[suite]} for _, own in measured))
    lengths = sorted({int(length) for _, length in shared})
    for number, own in measured:
        means = []
        for length in lengths:
            values = [own[suite][str(length)]["accuracy"] for suite, other in shared if other == str(length)]
            means.append(sum(values) / len(values))
        ax.plot(lengths, means, clip_on=False, **_look(number))
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if lengths:
        _over_length(ax, lengths)


def _tasks(ax: Axes, runs: Sequence[Run]) -> None:
    """Of each task one metric that all have: the first that is a share."""
    names = list(dict.fromkeys(task for run in runs for task in run.results.get("tasks", {})))
    shown: list[tuple[str, str]] = []
    for task in names:
        own = [found for found in task_results(runs, task) if found]
        shares = ("acc_norm", "acc", "exact_match", "f1")
        metric = next((m for m in shares if all(m in metrics for metrics in own)), None)
        if metric is not None:
            shown.append((task, metric))
    height = 0.8 / len(runs)
    for number in range(len(runs)):
        values = [task_results(runs, task)[number].get(metric) or 0.0 for task, metric in shown]
        places = [place + (number - (len(runs) - 1) / 2) * height for place in range(len(shown))]
        ax.barh(places, values, height=0.9 * height, color=PALETTE[number % len(PALETTE)])
    labels = [f"{task}\n{metric}{note(task_differences(runs, task), values=False)}" for task, metric in shown]
    ax.set_yticks(range(len(shown)), labels)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))


def _speed(ax: Axes, runs: Sequence[Run], what: str) -> None:
    key, lengths, fastest = f"{what}_tokens_per_second", set[int](), 0.0
    for number, run in enumerate(runs):
        points = sorted((int(length), cell[key]) for length, cell in run.results.get("speed", {}).items())
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, **_look(number))
            lengths, fastest = lengths | set(x), max(fastest, *y)
    ax.set_ylim(0, 1.1 * fastest)
    ax.yaxis.set_major_formatter(FuncFormatter(tick))
    _over_length(ax, sorted(lengths))
