"""Top-1, top-5 and loss of image classifiers, which `megatron-ext vision evaluate` measures."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_ext.evaluation.measure import MeasureKind, Panel
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.rows import Row, differences, note, shown

NAME = "images"
WEIGHTS, AVERAGE = "weights", "average"  # what of a checkpoint was measured
SAID = {WEIGHTS: "images", AVERAGE: "images, averaged weights"}


def say(found: dict[str, Any]) -> str:
    """A result, for people."""
    left_out = f"; {found['unreadable']} cannot be read" if found["unreadable"] else ""
    return (
        f"top-1 {found['top_1']:.2%} ({found['right']:,} of {found['images']:,}), top-5 {found['top_5']:.2%} "
        f"({found['among_5']:,}), loss {found['loss']:.4f} nats per image{left_out}"
    )


def rows(runs: Sequence[Run]) -> list[Row]:
    """Top-1, top-5 and loss, of the weights and of their average."""
    found = []
    for which, said in SAID.items():
        results = _results(runs, which)
        if not any(results):
            continue
        unequal = differences(results)
        counts = {result["images"] for result in results if result}
        ending = f" of {counts.pop():,}" if len(counts) == 1 else ""
        for name, form in (("top_1", "{:.2%}"), ("top_5", "{:.2%}")):
            found.append(Row(f"{said}: {name.replace('_', '-')}{ending}", shown(results, name, form), unequal))
        found.append(Row(f"{said}: loss, nats per image", shown(results, "loss", "{:.4f}"), unequal))
    return found


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Top-1 over parameters."""
    from megatron_ext.evaluation.panels import title

    found: list[Panel] = []
    for which, said in SAID.items():
        if any(results := _results(runs, which)):
            heading = title(f"{said}: top-1" + note(differences(results), values=False))
            found.append((heading, partial(_draw, which=which)))
    return found


def _results(runs: Sequence[Run], which: str) -> list[dict[str, Any]]:
    return [run.results.get(NAME, {}).get(which, {}) for run in runs]


def _draw(ax: Any, runs: Sequence[Run], which: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    from megatron_ext.evaluation.panels import look
    from megatron_ext.reports.figures import tick

    for number, (run, result) in enumerate(zip(runs, _results(runs, which), strict=True)):
        if result:
            ax.plot(run.parameters, result["top_1"], label=run.name, **{**look(number), "markersize": 8})
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.margins(0.2)
    ax.set_xlabel("parameters")


KIND = MeasureKind(rows=rows, panels=panels)
