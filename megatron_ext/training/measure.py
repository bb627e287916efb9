"""`megatron-ext evaluate`: what a checkpoint is worth, measured on any layout, into `results.json`."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.ranks import rank
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.answers import Answers
from megatron_ext.evaluation.perplexity import Perplexity, Window
from megatron_ext.evaluation.results import Results
from megatron_ext.evaluation.synthetic import SUITES, curves
from megatron_ext.evaluation.synthetic.curves import SHORTEST
from megatron_ext.inference.passage import Passage, Score
from megatron_ext.inference.progress import progress
from megatron_ext.inference.prompts import Writer, stop_tokens
from megatron_ext.inference.tokenizer import tokenizer_of, words_of
from megatron_ext.models.config import Architecture
from megatron_ext.training import inference
from megatron_ext.training.launch import Launch

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

WINDOW = 4096  # tokens, if the user does not say
FACTS = ("samples", "num_fewshot", "version")  # of a task, beside its metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    inference.add_arguments(parser)
    parser.add_argument("--save", type=Path, metavar="DIR", help="where results.json goes; by default the checkpoint's")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    parser.add_argument("--window", type=int, metavar="N", help="read at once; the model's length, 4096 at most")
    text = parser.add_argument_group("text", "perplexity and bits per byte")
    text.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help='texts, or .jsonl with a "text" on each line'
    )
    text.add_argument("--stride", type=int, metavar="N", help="by which the window moves; by default half of it")
    tasks = parser.add_argument_group("tasks", "lm-evaluation-harness; interrupted, it goes on where it stopped")
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks or groups of the harness")
    folders = {"type": Path, "action": "append", "default": [], "metavar": "DIR"}
    tasks.add_argument("--task-folder", **folders, help="where else tasks are described")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples; by default the task's own number")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task; by default all")
    synthetic = parser.add_argument_group("synthetic", "questions about long contexts, made from a seed")
    synthetic.add_argument("--synthetic", nargs="+", metavar="NAME", help="all, or: " + ", ".join(SUITES))
    lengths = f"by default powers of two from {SHORTEST} to the model's length"
    synthetic.add_argument("--synthetic-lengths", type=int, nargs="+", metavar="N", help=lengths)
    synthetic.add_argument("--synthetic-samples", type=int, default=50, metavar="N", help="default: %(default)s")
    synthetic.add_argument("--synthetic-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    speed = parser.add_argument_group("speed", "tokens per second of prefill and decode, with random tokens")
    speed.add_argument("--speed", type=int, nargs="+", metavar="N", help="tokens of context; --batch-size sequences")


def main(args: argparse.Namespace) -> None:
    """Validate everything, then measure what was asked for, one thing after the other."""
    for name in ("batch_tokens", "batch_size", "synthetic_samples"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", got=getattr(args, name), legal="at least 1")
    if not (args.text or args.tasks or args.synthetic or args.speed):
        raise ConfigError("nothing to measure", legal="--text FILE, --tasks NAME, --synthetic NAME or --speed N")
    if min(args.speed or [1]) < 1:
        raise ConfigError("--speed", got=min(args.speed), legal="at least one token of context")
    results = Results(args.checkpoint, args.save)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    started = inference.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    length = args.window or min(WINDOW, started.architecture.max_position_embeddings)
    jobs: list[tuple[str, Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], str]]] = []
    if args.text:
        text = Perplexity(args.text, tokenizer, Window(length, args.stride or -(-length // 2)))
        jobs.append(("text", lambda model: text.result(scored(model, text.passages, args.batch_tokens)), _say_text))
    if args.tasks:
        jobs.append(("tasks", _tasks(args, started, results, tokenizer, length), _say_tasks))
    if args.synthetic:
        jobs.append(("synthetic", _synthetic(args, results, tokenizer, started.architecture), _say_synthetic))
    if args.speed:
        jobs.append(("speed", partial(_speed, sorted(set(args.speed)), args.batch_size), _say_speed))
    with inference.opened(started, words_of(args.checkpoint, tokenizer)) as model:
        for name, measure, say in jobs:
            found = measure(model)
            if rank() == 0:
                results.add(**{name: found})
                print(say(found), flush=True)
        if rank() == 0:
            print(f"wrote {results.directory / 'results.json'}", flush=True)


def _tasks(
    args: argparse.Namespace, started: Launch, results: Results, tokenizer: Any, length: int
) -> Callable[["ShardedModel"], dict[str, Any]]:
    """What runs the harness's tasks, once it is sure that they exist."""
    try:
        from megatron_ext.evaluation import harness
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not installed: {error}", legal="pip install 'megatron-ext[eval]'"
        ) from error
    loaded = harness.Tasks(args.tasks, args.task_folder, args.num_fewshot).load()
    limits = harness.Limits(length, args.batch_tokens, args.batch_size)
    writer = Writer(tokenizer, stop_tokens(args.checkpoint, tokenizer))

    def measure(model: "ShardedModel") -> dict[str, Any]:
        answers = Answers(
            results.directory / "answers.jsonl", {**results.about, "dtype": str(started.args.params_dtype)}
        )
        found = harness.run_tasks(harness.MegatronLM(model, writer, limits, answers), loaded, args.limit)
        if rank() == 0 and answers.found:
            print(f"{answers.found:,} answers were there already, in {results.directory / 'answers.jsonl'}", flush=True)
        return found

    return measure


def _synthetic(
    args: argparse.Namespace, results: Results, tokenizer: Any, architecture: Architecture
) -> Callable[["ShardedModel"], dict[str, Any]]:
    """What measures the synthetic suites; a suite and length at a time, of which each is kept when it is there."""
    longest = architecture.max_position_embeddings
    cells = curves.cells(curves.suites(args.synthetic), args.synthetic_lengths, longest, tokenizer)

    def measure(model: "ShardedModel") -> dict[str, Any]:
        found: dict[str, Any] = results.section("synthetic")
        for suite, length in cells:
            own = curves.passages(suite, tokenizer, length, args.synthetic_seed, args.synthetic_samples)
            cell = curves.accuracy(scored(model, own, args.batch_tokens, f"{suite.name} at {length:,}"))
            found.setdefault(suite.name, {})[str(length)] = {**cell, "seed": args.synthetic_seed}
            if rank() == 0:
                results.add(synthetic=found)
        if rank() == 0:
            curves.plot(found, results.directory / "synthetic.png")
        return found

    return measure


def _say_synthetic(found: dict[str, Any]) -> str:
    lengths = sorted({int(length) for cells in found.values() for length in cells})
    rows = [["accuracy", *(f"{length:,}" for length in lengths)]]
    for name, cells in found.items():
        accuracies = [cells.get(str(length), {}).get("accuracy") for length in lengths]
        rows.append([name, *("-" if accuracy is None else f"{accuracy:.0%}" for accuracy in accuracies)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows)


def _speed(lengths: list[int], batch_size: int, model: "ShardedModel") -> dict[str, Any]:
    from megatron_ext.inference.speed import speed

    return {str(length): speed(model, length, batch_size) for length in lengths}


def _say_speed(found: dict[str, Any]) -> str:
    return "\n".join(
        f"speed at {int(length):,} tokens, {cell['batch_size']} sequences: prefill "
        f"{cell['prefill_tokens_per_second']:,.0f}, decode {cell['decode_tokens_per_second']:,.1f} tokens per second"
        for length, cell in found.items()
    )


def _say_text(found: dict[str, Any]) -> str:
    perplexity = "infinite" if found["perplexity"] is None else f"{found['perplexity']:.2f}"
    return (
        f"text: {found['loss']:.4f} nats per token, perplexity {perplexity}, "
        f"{found['bits_per_byte']:.4f} bits per byte over {found['tokens']:,} tokens"
    )


def _say_tasks(found: dict[str, Any]) -> str:
    lines = []
    for name, metrics in found.items():
        for metric, value in metrics.items():
            if metric in FACTS or "_stderr" in metric:
                continue
            base, space, filtered = metric.partition(" ")
            error = metrics.get(f"{base}_stderr{space}{filtered}")
            lines.append(f"{name}: {metric} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return "\n".join(lines)


def scored(model: "ShardedModel", passages: Sequence[Passage], batch_tokens: int, what: str = "scoring") -> list[Score]:
    """The scores of passages in order, on every rank, with progress."""
    from megatron_ext.inference.score import score

    found: dict[int, Score] = {}
    with progress(what, len(passages)) as advance:
        for number, result in score(model, passages, batch_tokens):
            found[number] = result
            advance()
    return [found[i] for i in range(len(passages))]
