"""Accuracy over length: what is asked, what comes of the scores, and the picture."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.evaluation.synthetic import SUITES
from megatron_ext.evaluation.synthetic.suite import Suite
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest

SHORTEST, LONGEST = 256, 131_072
ALL_FIT = 1024  # tokens in which any suite has questions, with any tokenizer
Cell = tuple[Suite, int]
# Okabe and Ito's palette and three more; a suite keeps its colour from picture to picture.
PALETTE = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#3B3B3B", "#8A6D3B", "#999999")


def suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, or all.

    Raises:
        ConfigError: There is none of a name.
    """
    if list(names) == ["all"]:
        return list(SUITES.values())
    for name in names:
        if name not in SUITES:
            raise ConfigError("no such synthetic suite", got=name, legal=nearest(name, ["all", *SUITES]))
    return [SUITES[name] for name in dict.fromkeys(names)]


def cells(suites: Sequence[Suite], lengths: Sequence[int] | None, longest: int, tokenizer: Any) -> list[Cell]:
    """What is to be measured: each suite at each length.

    Args:
        suites: The suites.
        lengths: By default powers of two from `SHORTEST` to `longest` (or that alone), as far as a suite has questions
            so short.
        longest: See `lengths`.
        tokenizer: See `Suite.samples`.

    Raises:
        ConfigError: A suite has no questions as short as the shortest length that was given.
    """
    powers = [2**k for k in range(SHORTEST.bit_length() - 1, LONGEST.bit_length()) if 2**k <= longest]
    found = [(suite, length) for suite in suites for length in sorted(set(lengths or powers or [longest]))]
    if lengths is not None:
        for suite in suites:
            next(suite.samples(tokenizer, min(lengths), 0))
        return found
    return [(suite, length) for suite, length in found if length > ALL_FIT or _fits(suite, length, tokenizer)]


def _fits(suite: Suite, length: int, tokenizer: Any) -> bool:
    try:
        next(suite.samples(tokenizer, length, 0))
    except ConfigError:
        return False
    return True


def passages(suite: Suite, tokenizer: Any, length: int, seed: int, count: int) -> list[LoglikelihoodRequest]:
    """Questions with their answers, of which the answers are scored."""
    asked = islice(suite.samples(tokenizer, length, seed), count)
    return [LoglikelihoodRequest([*sample.prompt, *sample.answer], len(sample.prompt)) for sample in asked]


def accuracy(scores: Sequence[Loglikelihood]) -> dict[str, float]:
    """What share of the answers greedy decoding would give as a whole, and what share of their tokens.

    One forward pass says so: each token of a right answer is the most probable one after the right ones before it.
    """
    tokens = sum(len(score.greedy) for score in scores)
    return {
        "accuracy": sum(score.all_greedy for score in scores) / len(scores),
        "token_accuracy": sum(int(score.greedy.sum()) for score in scores) / tokens,
        "samples": len(scores),
    }


def plot(found: dict[str, dict[str, dict[str, float]]], out: Path) -> None:
    """Draw accuracy over length, a panel for each suite.

    Args:
        found: By suite and length: `accuracy` and `token_accuracy`.
        out: The PNG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    from megatron_ext.reports.figures import GREY, STYLE, save

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    lengths = sorted({int(length) for cells in found.values() for length in cells})
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 3.4 * columns, 0.6 + 2.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for ax, (name, cells) in zip(axes, found.items(), strict=False):
            points = sorted((int(length), cell) for length, cell in cells.items())
            color = PALETTE[list(SUITES).index(name) % len(PALETTE)]
            x = [length for length, _ in points]
            ax.plot(x, [cell["token_accuracy"] for _, cell in points], color=GREY, linewidth=1, linestyle="--")
            ax.plot(x, [cell["accuracy"] for _, cell in points], color=color, marker="o", markersize=4, clip_on=False)
            ax.set_title(name.replace("_", " "))
        for ax in axes[len(found) :]:
            ax.set_visible(False)
        axes[0].set_xscale("log", base=2)
        axes[0].set_ylim(0, 1)
        axes[0].set_xticks(lengths if len(lengths) < 6 else lengths[::2])
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
        axes[0].xaxis.set_minor_locator(NullLocator())
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.supxlabel("tokens of question and answer (line: whole answers right; dashed: their tokens)", fontsize=9)
        save(figure, out)
