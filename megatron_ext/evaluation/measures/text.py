"""Perplexity and bits per byte of texts (`--text`)."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.evaluation.measure import Evaluation, Measure, MeasureKind, Panel
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.measures.scoring import scored
from megatron_ext.evaluation.perplexity import Perplexity, Window
from megatron_ext.evaluation.rows import Row, Unequal, differences, note, shown
from megatron_ext.inference.interrupt import stop_if_asked
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest
from megatron_ext.reports.results import SETTINGS

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

WINDOW = 4096  # tokens of text, if the user does not say
AT_ONCE = 16  # batches of small files that are scored together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of texts."""
    text = parser.add_argument_group("text", "perplexity and bits per byte")
    text.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help='texts, or JSON Lines with a "text" on each line'
    )
    text.add_argument("--stride", type=int, metavar="N", help="by which the window moves; by default half of it")


class TextMeasure(Measure):
    """How well texts are predicted; file by file."""

    name = "text"

    def __init__(self, evaluation: Evaluation) -> None:
        args = evaluation.args
        length = args.window or min(WINDOW, evaluation.longest)
        self._text = Perplexity(args.text, evaluation.tokenizer, Window(length, args.stride or -(-length // 2)))
        self._batch_tokens = args.batch_tokens
        window = {"window": self._text.window.size, "stride": self._text.window.stride}
        self._settings = {**evaluation.settings, **window, "texts": self._text.texts}

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Score them."""

        def score(passages: Sequence[LoglikelihoodRequest]) -> list[Loglikelihood]:
            stop_if_asked()
            return scored(model, passages, self._batch_tokens)

        for found in self._text.results(score, AT_ONCE * self._batch_tokens):
            yield {**found, SETTINGS: self._settings}

    def say(self, found: dict[str, Any]) -> str:
        """All texts that are done."""
        perplexity = "not finite" if found["perplexity"] is None else f"{found['perplexity']:.2f}"
        return (
            f"text: {found['loss']:.4f} nats per token, perplexity {perplexity}, "
            f"{found['bits_per_byte']:.4f} bits per byte over {found['tokens']:,} tokens in {len(found['files'])} files"
        )


def rows(runs: Sequence[Run]) -> list[Row]:
    """Bits per byte, which tokenizers have no part in, and the loss."""
    texts = [run.results.get("text", {}) for run in runs]
    if not any(texts):
        return []
    values = shown(texts, "bits_per_byte", "{:.4f}"), shown(texts, "loss", "{:.4f}")
    return [
        Row("text: bits per byte", values[0], text_differences(runs)),
        Row("text: loss, nats per token", values[1], differences(texts)),  # in which the tokenizer has a part
    ]


def text_differences(runs: Sequence[Run]) -> Unequal:
    """In what the texts of runs were measured differently, as far as bits per byte depend on it."""
    return differences([run.results.get("text", {}) for run in runs], ("texts", "window", "stride", "dtype"))


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Bits per byte over parameters."""
    from megatron_ext.evaluation.panels import over_parameters, title

    if not any(run.results.get("text") for run in runs):
        return []
    heading = title("bits per byte" + note(text_differences(runs), values=False))
    return [(heading, lambda ax, runs: over_parameters(ax, runs, "text", "bits_per_byte"))]


KIND = MeasureKind(add_arguments, lambda args: bool(args.text), TextMeasure, rows, panels)
