"""`megatron-ext evaluate`: what a checkpoint is worth, measured on any layout, into `results.json`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.ranks import rank
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.perplexity import Perplexity, Window
from megatron_ext.evaluation.results import Results
from megatron_ext.inference.passage import Passage, Score
from megatron_ext.inference.tokenizer import tokenizer_of, words_of
from megatron_ext.training import inference
from megatron_ext.training.progress import progress

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

WINDOW = 4096  # tokens, if the user does not say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    inference.add_arguments(parser)
    parser.add_argument("--save", type=Path, metavar="DIR", help="where results.json goes; by default the checkpoint's")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="at once (default: %(default)s)")
    text = parser.add_argument_group("text", "perplexity and bits per byte")
    text.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help='texts, or .jsonl with a "text" on each line'
    )
    text.add_argument("--window", type=int, metavar="N", help="read at once; the model's length, 4096 at most")
    text.add_argument("--stride", type=int, metavar="N", help="by which the window moves; by default half of it")


def main(args: argparse.Namespace) -> None:
    """Validate everything, then measure what was asked for, one thing after the other."""
    if args.batch_tokens < 1:
        raise ConfigError("--batch-tokens", got=args.batch_tokens, legal="at least 1")
    if not args.text:
        raise ConfigError("nothing to measure", legal="--text FILE")
    results = Results(args.checkpoint, args.save)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    started = inference.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    text = None
    if args.text:
        size = args.window or min(WINDOW, started.architecture.max_position_embeddings)
        text = Perplexity(args.text, tokenizer, Window(size, args.stride or -(-size // 2)))
    with inference.opened(started, words_of(args.checkpoint, tokenizer)) as model:
        if text is not None:
            found = text.result(scored(model, text.passages, args.batch_tokens, "scoring text"))
            if rank() == 0:
                results.add(text=found)
                print(
                    f"text: {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
                    f"{found['bits_per_byte']:.4f} bits per byte over {found['tokens']:,} tokens", flush=True,
                )  # fmt: skip
        if rank() == 0:
            print(f"wrote {results.directory / 'results.json'}", flush=True)


def scored(model: "ShardedModel", passages: Sequence[Passage], batch_tokens: int, what: str) -> list[Score]:
    """The scores of passages in order, on every rank, with progress."""
    from megatron_ext.inference.score import score

    found: dict[int, Score] = {}
    with progress(what, len(passages)) as advance:
        for number, result in score(model, passages, batch_tokens):
            found[number] = result
            advance()
    return [found[i] for i in range(len(passages))]
