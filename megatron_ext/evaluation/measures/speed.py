"""Tokens per second of prefill and decode, over the context (`--speed`)."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.measure import Evaluation, Measure, MeasureKind, Panel
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.rows import Row, differences, keys, shown
from megatron_ext.inference.interrupt import stop_if_asked
from megatron_ext.reports.progress import Progress
from megatron_ext.reports.results import SETTINGS

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

WAYS = ("prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of speed."""
    speed = parser.add_argument_group("speed", "tokens per second of prefill and decode, with random tokens")
    speed.add_argument("--speed", type=int, nargs="+", metavar="N", help="tokens of context; --batch-size sequences")


def asked(args: argparse.Namespace) -> bool:
    """Whether there are lengths.

    Raises:
        ConfigError: One has no token.
    """
    if min(args.speed or [1]) < 1:
        raise ConfigError("--speed", got=min(args.speed), legal="at least one token of context")
    return bool(args.speed)


class SpeedMeasure(Measure):
    """Tokens per second of prefill and decode; a length at a time."""

    name = "speed"

    def __init__(self, evaluation: Evaluation) -> None:
        self._lengths, self._batch_size = sorted(set(evaluation.args.speed)), evaluation.args.batch_size
        self._dtype = evaluation.settings["dtype"]

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Run the clock."""
        from megatron_ext.inference.speed import speed

        with Progress("timing", len(self._lengths)) as progress:
            for length in self._lengths:
                stop_if_asked()
                cell = speed(model, length, self._batch_size)
                settings = {"dtype": self._dtype, "batch_size": cell["batch_size"], "ranks": cell["ranks"]}
                yield {str(length): {**cell, SETTINGS: settings}}
                progress.advance()

    def say(self, found: dict[str, Any]) -> str:
        """One length."""
        return "\n".join(
            f"speed at {int(length):,} tokens, {cell['batch_size']} sequences: "
            f"prefill {cell['prefill_tokens_per_second']:,.0f}, "
            f"decode {cell['decode_tokens_per_second']:,.1f} tokens per second"
            for length, cell in found.items()
        )


def rows(runs: Sequence[Run]) -> list[Row]:
    """Tokens per second, a row for each way and length."""
    found = []
    for way in WAYS:
        for length in sorted(map(int, keys(runs, "speed"))):
            cells = [run.results.get("speed", {}).get(str(length), {}) for run in runs]
            values = shown(cells, f"{way}_tokens_per_second", "{:,.1f}")
            found.append(Row(f"{way} at {length:,}, tokens/s", values, differences(cells)))
    return found


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Tokens per second over length."""
    if not any(run.results.get("speed") for run in runs):
        return []
    return [(f"{way}, tokens per second", partial(_draw, what=way)) for way in WAYS]


def _draw(ax: Any, runs: Sequence[Run], what: str) -> None:
    from matplotlib.ticker import FuncFormatter

    from megatron_ext.evaluation.panels import look, over_length
    from megatron_ext.reports.figures import tick

    key, lengths, fastest = f"{what}_tokens_per_second", set[int](), 0.0
    for number, run in enumerate(runs):
        points = sorted((int(length), cell[key]) for length, cell in run.results.get("speed", {}).items())
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, **look(number))
            lengths, fastest = lengths | set(x), max(fastest, *y)
    ax.set_ylim(0, 1.1 * fastest)
    ax.yaxis.set_major_formatter(FuncFormatter(tick))
    over_length(ax, sorted(lengths))


KIND = MeasureKind(add_arguments, asked, SpeedMeasure, rows, panels)
