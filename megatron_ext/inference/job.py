"""`megatron-ext generate`: a checkpoint continues prompts."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.checkpoint.outputs import check_writable
from megatron_ext.checkpoint.ranks import gather, rank
from megatron_ext.errors import ConfigError
from megatron_ext.inference import session
from megatron_ext.inference.chat import check_template, conversation, render
from megatron_ext.inference.interrupt import Interrupted, interruptible
from megatron_ext.inference.prompts import TextCodec, read_prompts, stop_tokens
from megatron_ext.inference.request import Request
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.tokenizer import tokenizer_of, vocab_size_of
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.progress import Progress

FARTHEST = 32
"""How many times the length it was made for a model with attention is asked to read at most."""


def main(args: argparse.Namespace) -> None:
    """Generate, and print or write what came out."""
    prompts = _prompts(args)
    if args.output:
        if args.output.exists():
            raise ConfigError("the output exists already and is not overwritten", got=args.output, legal="a new file")
        check_writable(args.output.parent, "--output")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.draw_seed)
    layout.find(args.checkpoint)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    if args.chat:
        check_template(tokenizer)
    ends = frozenset() if args.ignore_eos else stop_tokens(args.checkpoint, tokenizer)
    writer = TextCodec(tokenizer, ends, args.stop)
    encoded = [_encoded(prompt, writer, args) for prompt in prompts]
    started = session.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    from megatron_ext.inference.generate import generate

    requests = [writer.request(tokens, args.max_new_tokens) for tokens in encoded]
    _check_lengths(requests, started.architecture)
    if rank() == 0:
        _warn(requests, started.architecture)
    made: dict[int, Sequence[int]] = {}
    stopped = None
    with session.open_checkpoint(started, min(vocab_size_of(args.checkpoint, tokenizer), len(tokenizer))) as model:
        begun = time.monotonic()
        try:
            with Progress("continuing", len(requests)) as shown, interruptible():
                for number, new in generate(model, requests, sampling, args.batch_size):
                    made[number] = new
                    shown.advance()
        except Interrupted as signal:
            stopped = signal
        if rank() == 0:
            rows = [
                {"prompt": prompts[i], "text": writer.text(encoded[i], made[i]), "tokens": list(made[i])}
                for i in sorted(made)
            ]
            _tell(args, rows, time.monotonic() - begun, stopped)
        gather(None)  # a rank that ends with a status ends the others
    if stopped:
        sys.exit(stopped.status)


def _prompts(args: argparse.Namespace) -> list[str]:
    """What is to be continued, once what can be said of the command line alone is right."""
    for prompt in args.prompt:
        if not _is_text(prompt):
            raise ConfigError("a prompt is no text", got=ascii(prompt), legal="what UTF-8 can spell")
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ConfigError("nothing to continue", legal="--prompt TEXT or --prompts FILE")
    if "" in args.stop:
        raise ConfigError("--stop is empty", legal="a text")
    if args.system is not None and not args.chat:
        raise ConfigError("--system is for conversations", legal="with --chat")
    return prompts


def _encoded(prompt: str, writer: TextCodec, args: argparse.Namespace) -> list[int]:
    if not args.chat:
        return writer.encode(prompt)
    # The template spells out the token that begins a text, if there is one.
    return writer.encode(render(writer.tokenizer, conversation(prompt, args.system)), special=False)


def _is_text(prompt: str) -> bool:
    """Whether no byte of the command line was none of UTF-8's, which Python shows as half a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _check_lengths(requests: Sequence[Request], architecture: Architecture) -> None:
    """Refuse what attention, whose time is quadratic in the length, would not come back from.

    Raises:
        ConfigError: A prompt, such as a book on one line, or what it would become is far beyond the positions that the
            model was made for.
    """
    if "*" not in architecture.pattern:
        return
    legal = FARTHEST * architecture.max_position_embeddings
    most = f"at most {legal:,}, {FARTHEST} times the positions it was made for"
    longest = max(len(request.prompt) for request in requests)
    if longest > legal:
        got = f"{longest:,} tokens"
        raise ConfigError(
            "a prompt is too long for the model", got=got, legal=f"{most}; each line of a text is a prompt"
        )
    whole = max(len(request.prompt) + request.max_new_tokens for request in requests)
    if whole > legal:
        raise ConfigError(
            "a prompt would become too long for the model", got=f"{whole:,} tokens with --max-new-tokens", legal=most
        )


def _warn(requests: Sequence[Request], architecture: Architecture) -> None:
    """Say so where positions are reached that the model was not trained on."""
    length = architecture.max_position_embeddings
    beyond = sum(len(request.prompt) + request.max_new_tokens > length for request in requests)
    if beyond and architecture.position_embedding_type == "rope":
        print(
            f"warning: {beyond:,} of {len(requests):,} prompts may reach with their new tokens beyond the {length:,} "
            "positions that the model was made for",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _tell(
    args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], seconds: float, stopped: Interrupted | None
) -> None:
    """Print or write what came out, or what there is of it."""
    how = f"{stopped}: not all prompts were continued; " if stopped else ""
    if args.output:
        # What is not all of it is not found under the name of what is.
        output = args.output.with_name(args.output.name + ".partial") if stopped else args.output
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        count = sum(len(row["tokens"]) for row in rows)
        print(f"{how}wrote {output}: {len(rows):,} continuations, {count:,} tokens in {seconds:.1f} s", flush=True)
        return
    for row in rows:
        print(f"{row['prompt']}{chr(10) if args.chat else ''}{row['text']}", flush=True)
        if row is not rows[-1]:
            print("-" * 40, flush=True)
    if how:
        print(how.removesuffix("; "), file=sys.stderr, flush=True)
