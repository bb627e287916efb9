"""`megatron-ext generate`: a checkpoint continues prompts."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.ranks import rank
from megatron_ext.errors import ConfigError
from megatron_ext.inference.progress import progress
from megatron_ext.inference.prompts import Writer, read_prompts, stop_tokens
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.tokenizer import tokenizer_of, words_of
from megatron_ext.training import inference
from megatron_ext.training.directory import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    inference.add_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='a prompt on each line; JSON Lines: its "prompt"')
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new .jsonl instead of standard output")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a continuation before it")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends a document")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    sampling = parser.add_argument_group("sampling", "greedy by default; the same on every layout and in every batch")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the most probable token")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from those of probability P")
    sampling.add_argument("--draw-seed", type=int, default=0, metavar="N", help="default: %(default)s")


def main(args: argparse.Namespace) -> None:
    """Generate, and print or write what came out."""
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    for prompt in prompts:
        if not _is_text(prompt):
            raise ConfigError("a prompt is no text", got=ascii(prompt), legal="what UTF-8 can spell")
    if not prompts:
        raise ConfigError("nothing to continue", legal="--prompt TEXT or --prompts FILE")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", got=getattr(args, name), legal="at least 1")
    if "" in args.stop:
        raise ConfigError("--stop is empty", legal="a text")
    if args.output and args.output.exists():
        raise ConfigError("the output exists already and is not overwritten", got=args.output, legal="a new file")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.draw_seed)
    layout.find(args.checkpoint)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    ends = frozenset() if args.ignore_eos else stop_tokens(args.checkpoint, tokenizer)
    writer = Writer(tokenizer, ends, args.stop)
    started = inference.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    from megatron_ext.inference.generate import generate

    requests = [writer.request(writer.encode(prompt), args.max_new_tokens) for prompt in prompts]
    made: dict[int, list[int]] = {}
    with (
        inference.opened(started, min(words_of(args.checkpoint, tokenizer), len(tokenizer))) as model,
        progress("continuing", len(requests)) as advance,
    ):
        begun = time.monotonic()
        for number, new in generate(model, requests, sampling, args.batch_size):
            made[number] = new
            advance()
        seconds = time.monotonic() - begun
        if rank() == 0:
            _tell(args, prompts, [made[i] for i in range(len(prompts))], writer, seconds)


def _is_text(prompt: str) -> bool:
    """Whether no byte of the command line was none of UTF-8's, which Python shows as half a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _tell(
    args: argparse.Namespace, prompts: Sequence[str], new: Sequence[Sequence[int]], writer: Writer, seconds: float
):
    rows = [
        {"prompt": prompt, "text": writer.text(writer.encode(prompt), tokens), "tokens": list(tokens)}
        for prompt, tokens in zip(prompts, new, strict=True)
    ]
    if args.output:
        write_atomically(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        count = sum(len(tokens) for tokens in new)
        print(f"wrote {args.output}: {len(rows):,} continuations, {count:,} tokens in {seconds:.1f} s", flush=True)
        return
    for row in rows:
        print(f"{row['prompt']}{row['text']}", flush=True)
        if row is not rows[-1]:
            print("-" * 40, flush=True)
