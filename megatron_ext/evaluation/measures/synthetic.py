"""Accuracy of questions about long contexts, over their length (`--synthetic`)."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.measure import Evaluation, Measure, MeasureKind, Panel
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.measures.scoring import scored
from megatron_ext.evaluation.rows import Row, differences, keys, shown
from megatron_ext.evaluation.synthetic import SUITES, curves
from megatron_ext.evaluation.synthetic.curves import SHORTEST
from megatron_ext.inference.interrupt import stop_if_asked
from megatron_ext.reports.results import SETTINGS, Results

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of synthetic suites."""
    synthetic = parser.add_argument_group("synthetic", "questions about long contexts, made from a seed")
    synthetic.add_argument("--synthetic", nargs="+", metavar="NAME", help="all, or: " + ", ".join(SUITES))
    lengths = f"by default powers of two from {SHORTEST} to the model's length"
    synthetic.add_argument("--synthetic-lengths", type=int, nargs="+", metavar="N", help=lengths)
    synthetic.add_argument("--synthetic-samples", type=int, default=50, metavar="N", help="default: %(default)s")
    synthetic.add_argument("--synthetic-seed", type=int, default=0, metavar="N", help="default: %(default)s")


def asked(args: argparse.Namespace) -> bool:
    """Whether there are suites.

    Raises:
        ConfigError: Not one question is asked.
    """
    if args.synthetic_samples < 1:
        raise ConfigError("--synthetic-samples", got=args.synthetic_samples, legal="at least 1")
    return bool(args.synthetic)


class SyntheticMeasure(Measure):
    """Questions about long contexts; a suite and length at a time."""

    name = "synthetic"

    def __init__(self, evaluation: Evaluation) -> None:
        args, suites = evaluation.args, curves.suites(evaluation.args.synthetic)
        self._cells = curves.cells(suites, args.synthetic_lengths, evaluation.longest, evaluation.tokenizer)
        self._tokenizer, self._batch_tokens = evaluation.tokenizer, args.batch_tokens
        self._seed, self._samples = args.synthetic_seed, args.synthetic_samples
        self._settings = {**evaluation.settings, "seed": self._seed, "samples": self._samples}

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Ask them."""
        for suite, length in self._cells:
            stop_if_asked()
            own = curves.passages(suite, self._tokenizer, length, self._seed, self._samples)
            cell = curves.accuracy(scored(model, own, self._batch_tokens, f"{suite.name} at {length:,}"))
            yield {suite.name: {str(length): {**cell, "seed": self._seed, SETTINGS: self._settings}}}

    def say(self, found: dict[str, Any]) -> str:
        """One cell."""
        return "\n".join(
            f"{name} at {int(length):,} tokens: accuracy {cell['accuracy']:.0%}, of tokens {cell['token_accuracy']:.0%}"
            for name, cells in found.items()
            for length, cell in cells.items()
        )

    def finish(self, results: Results) -> None:
        """Draw accuracy over length."""
        if found := results.section(self.name):
            curves.plot(found, results.directory / "synthetic.png")


def rows(runs: Sequence[Run]) -> list[Row]:
    """Accuracy, a row for each suite and length."""
    found = []
    for suite in keys(runs, "synthetic"):
        for length in sorted({int(n) for run in runs for n in run.results.get("synthetic", {}).get(suite, {})}):
            cells = [run.results.get("synthetic", {}).get(suite, {}).get(str(length), {}) for run in runs]
            found.append(Row(f"{suite} at {length:,}", shown(cells, "accuracy", "{:.0%}"), differences(cells)))
    return found


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Accuracy over length."""
    return [("synthetic suites, mean accuracy", _draw)] if any(run.results.get("synthetic") for run in runs) else []


def _draw(ax: Any, runs: Sequence[Run]) -> None:
    """Of each length the mean over those suites that all runs were asked at it."""
    from matplotlib.ticker import PercentFormatter

    from megatron_ext.evaluation.panels import look, over_length

    measured = [(number, run.results["synthetic"]) for number, run in enumerate(runs) if run.results.get("synthetic")]
    shared = set.intersection(*({(suite, length) for suite in own for length in own[suite]} for _, own in measured))
    lengths = sorted({int(length) for _, length in shared})
    for number, own in measured:
        means = []
        for length in lengths:
            values = [own[suite][str(length)]["accuracy"] for suite, other in shared if other == str(length)]
            means.append(sum(values) / len(values))
        ax.plot(lengths, means, clip_on=False, **look(number))
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if lengths:
        over_length(ax, lengths)


KIND = MeasureKind(add_arguments, asked, SyntheticMeasure, rows, panels)
