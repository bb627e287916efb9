"""`megatron-ext evaluate`: what a checkpoint is worth, measured on any layout, into `results.json`.

A measure is asked for its results piece by piece: a file, a task, a length at a time. Each piece is on disk before the
next one begins, so that whatever ends the program ends it with what was measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ext.checkpoint.ranks import gather, rank
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation import run_tasks
from megatron_ext.evaluation.perplexity import Perplexity, Window
from megatron_ext.evaluation.synthetic import SUITES, curves
from megatron_ext.evaluation.synthetic.curves import SHORTEST
from megatron_ext.inference import session
from megatron_ext.inference.interrupt import Interrupted, interruptible, stop_if_asked
from megatron_ext.inference.passage import Loglikelihood, LoglikelihoodRequest
from megatron_ext.inference.tokenizer import identity, tokenizer_of, words_of
from megatron_ext.reports.progress import progress
from megatron_ext.reports.results import SETTINGS, Results

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

WINDOW = 4096  # tokens of text, if the user does not say
AT_ONCE = 16  # batches of small files that are scored together


class Measure(Protocol):
    """Something that is measured of a model.

    Attributes:
        name: The section of `results.json`.
    """

    name: str

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Measure, on all ranks; each part of the section as it is there."""
        ...

    def say(self, found: dict[str, Any]) -> str:
        """A part of the section, for people."""
        ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    session.add_arguments(parser)
    parser.add_argument("--save", type=Path, metavar="DIR", help="where results.json goes; by default the checkpoint's")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    window = f"tokens read at once; by default the model's length, of --text {WINDOW} at most"
    parser.add_argument("--window", type=int, metavar="N", help=window)
    text = parser.add_argument_group("text", "perplexity and bits per byte")
    text.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help='texts, or JSON Lines with a "text" on each line'
    )
    text.add_argument("--stride", type=int, metavar="N", help="by which the window moves; by default half of it")
    run_tasks.add_arguments(parser)
    synthetic = parser.add_argument_group("synthetic", "questions about long contexts, made from a seed")
    synthetic.add_argument("--synthetic", nargs="+", metavar="NAME", help="all, or: " + ", ".join(SUITES))
    lengths = f"by default powers of two from {SHORTEST} to the model's length"
    synthetic.add_argument("--synthetic-lengths", type=int, nargs="+", metavar="N", help=lengths)
    synthetic.add_argument("--synthetic-samples", type=int, default=50, metavar="N", help="default: %(default)s")
    synthetic.add_argument("--synthetic-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    speed = parser.add_argument_group("speed", "tokens per second of prefill and decode, with random tokens")
    speed.add_argument("--speed", type=int, nargs="+", metavar="N", help="tokens of context; --batch-size sequences")
    parser.epilog = f"{parser.epilog} Interrupted by Ctrl-C or SIGTERM it keeps what was measured: status 130 or 143."


def main(args: argparse.Namespace) -> None:
    """Validate everything, then measure what was asked for, one thing after the other."""
    for name in ("batch_tokens", "batch_size", "synthetic_samples"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", got=getattr(args, name), legal="at least 1")
    if args.window is not None and args.window < 1:
        raise ConfigError("--window", got=args.window, legal="at least 1")
    if not (args.text or args.tasks or args.synthetic or args.speed):
        raise ConfigError("nothing to measure", legal="--text FILE, --tasks NAME, --synthetic NAME or --speed N")
    if min(args.speed or [1]) < 1:
        raise ConfigError("--speed", got=min(args.speed), legal="at least one token of context")
    if not args.tasks:
        run_tasks.refuse_without_tasks(args)
    results = Results(args.checkpoint, args.save)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    started = session.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    longest = started.architecture.max_position_embeddings
    settings = {"dtype": str(started.args.params_dtype).removeprefix("torch."), "tokenizer": identity(tokenizer)}
    measures: list[Measure] = []
    if args.text:
        length = args.window or min(WINDOW, longest)
        window = Window(length, args.stride or -(-length // 2))
        measures.append(TextMeasure(Perplexity(args.text, tokenizer, window), args.batch_tokens, settings))
    if args.tasks:
        measures.append(run_tasks.TaskMeasure(args, results, tokenizer, args.window or longest, settings))
    if args.synthetic:
        measures.append(SyntheticMeasure(args, tokenizer, longest, settings))
    if args.speed:
        measures.append(SpeedMeasure(sorted(set(args.speed)), args.batch_size, settings))
    with session.open_checkpoint(started, words_of(args.checkpoint, tokenizer)) as model:
        stopped = _measure(measures, model, results)
        if rank() == 0:
            # Now that all of it is on disk.
            if args.synthetic and (found := results.section("synthetic")):
                curves.plot(found, results.directory / "synthetic.png")
            how = f"{stopped}: not everything was measured; " if stopped else ""
            print(f"{how}wrote {results.directory / 'results.json'}", flush=True)
        gather(None)  # a rank that ends with a status ends the others
    if stopped:
        sys.exit(stopped.status)


def _measure(measures: Sequence[Measure], model: "ShardedModel", results: Results) -> Interrupted | None:
    """Measure one thing after the other; what ended it before its end."""
    try:
        with interruptible():
            for measure in measures:
                for part in measure(model):
                    if rank() == 0:
                        results.add(**{measure.name: part})
                        print(measure.say(part), flush=True)
    except Interrupted as stopped:
        return stopped
    return None


class TextMeasure:
    """How well texts are predicted; file by file."""

    name = "text"

    def __init__(self, text: Perplexity, batch_tokens: int, settings: dict[str, Any]) -> None:
        self._text, self._batch_tokens = text, batch_tokens
        window = {"window": text.window.size, "stride": text.window.stride}
        self._settings = {**settings, **window, "texts": text.texts}

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


class SyntheticMeasure:
    """Questions about long contexts; a suite and length at a time."""

    name = "synthetic"

    def __init__(self, args: argparse.Namespace, tokenizer: Any, longest: int, settings: dict[str, Any]) -> None:
        self._cells = curves.cells(curves.suites(args.synthetic), args.synthetic_lengths, longest, tokenizer)
        self._tokenizer, self._batch_tokens = tokenizer, args.batch_tokens
        self._seed, self._samples = args.synthetic_seed, args.synthetic_samples
        self._settings = {**settings, "seed": self._seed, "samples": self._samples}

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


class SpeedMeasure:
    """Tokens per second of prefill and decode; a length at a time."""

    name = "speed"

    def __init__(self, lengths: list[int], batch_size: int, settings: dict[str, Any]) -> None:
        self._lengths, self._batch_size, self._dtype = lengths, batch_size, settings["dtype"]

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Run the clock."""
        from megatron_ext.inference.speed import speed

        with progress("timing", len(self._lengths)) as advance:
            for length in self._lengths:
                stop_if_asked()
                cell = speed(model, length, self._batch_size)
                settings = {"dtype": self._dtype, "batch_size": cell["batch_size"], "ranks": cell["ranks"]}
                yield {str(length): {**cell, SETTINGS: settings}}
                advance()

    def say(self, found: dict[str, Any]) -> str:
        """One length."""
        return "\n".join(
            f"speed at {int(length):,} tokens, {cell['batch_size']} sequences: "
            f"prefill {cell['prefill_tokens_per_second']:,.0f}, "
            f"decode {cell['decode_tokens_per_second']:,.1f} tokens per second"
            for length, cell in found.items()
        )


def scored(
    model: "ShardedModel", passages: Sequence[LoglikelihoodRequest], batch_tokens: int, what: str = "scoring"
) -> list[Loglikelihood]:
    """The scores of passages in order, on every rank, with progress."""
    from megatron_ext.inference.score import score

    found: dict[int, Loglikelihood] = {}
    with progress(what, len(passages)) as advance:
        for number, result in score(model, passages, batch_tokens):
            found[number] = result
            advance()
    return [found[i] for i in range(len(passages))]
