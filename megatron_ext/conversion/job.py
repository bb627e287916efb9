"""`megatron-ext convert`: checkpoints from and to Hugging Face directories and GPTModels."""

import argparse
import sys
import time
from pathlib import Path

from megatron_ext.checkpoint import gpt, layout
from megatron_ext.checkpoint.atomic import check_new
from megatron_ext.checkpoint.huggingface import companions, families
from megatron_ext.checkpoint.huggingface.coded import CodedFamily
from megatron_ext.checkpoint.huggingface.convert import TYPES, to_hf, to_megatron
from megatron_ext.conversion.verify import ROUNDING, TOLERANCE, verify, verify_gpt
from megatron_ext.errors import ConfigError

FORMATS = "the format of the input: hf, Megatron in the pattern form of all programs here, or Megatron's GPTModel"
LINE_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    formats = ("hf", "megatron", "gpt")
    parser.add_argument("input", type=Path, help="a Hugging Face directory, or a checkpoint of Megatron's")
    parser.add_argument("output", type=Path, help="a new directory")
    parser.add_argument("--from", dest="source", choices=formats, required=True, help=FORMATS)
    parser.add_argument("--to", dest="target", choices=formats, required=True, help="the format of the output")
    parser.add_argument("--dtype", choices=list(TYPES), help="the type of the weights; by default the one they have")
    parser.add_argument("--verify", action="store_true", help="load both models, compare logits and what they write")
    to = parser.add_argument_group("--to megatron")
    to.add_argument("--pad-vocab-to", type=int, default=1, metavar="N", help="add zero rows up to a multiple of N")
    back = parser.add_argument_group("--to hf")
    like = "take configuration and tokenizer from here, a Hugging Face directory or a checkpoint converted from one"
    back.add_argument("--like", type=Path, metavar="DIR", help=like)
    back.add_argument("--hf-class", metavar="NAME", help="what it is to be: " + ", ".join(families.FAMILIES))
    back.add_argument("--tokenizer", type=Path, metavar="DIR", help="by default the one it was trained with")
    back.add_argument("--vocab-size", type=int, metavar="N", help="rows of the embedding that are words, not padding")
    back.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Convert, and verify if asked to."""
    _check(args)
    dtype = TYPES[args.dtype] if args.dtype else None
    start = time.monotonic()
    with _Progress() as progress:
        if args.source == "gpt":
            gpt.to_pattern(args.input, args.output, progress)
        elif args.target == "gpt":
            gpt.to_gpt(args.input, args.output, progress)
        elif args.target == "megatron":
            to_megatron(args.input, args.output, dtype=dtype, vocab_multiple=args.pad_vocab_to, progress=progress)
        else:
            family = to_hf(
                args.input, args.output, like=args.like, family=args.hf_class, tokenizer=args.tokenizer,
                vocab_size=args.vocab_size, dtype=dtype, shard_bytes=int(args.shard_gb * 1e9), progress=progress,
            )  # fmt: skip
            if isinstance(family, CodedFamily):
                code = f"{family.module}.py beside the weights (trust_remote_code=True)"
                print(f"no class of transformers can express it: {family.name}, with {code}", flush=True)
            if not companions.tokenizer_files(args.output):
                print("no tokenizer was written: the model has none", flush=True)
    print(f"wrote {args.output}: {progress.total / 1e9:.2f} GB in {time.monotonic() - start:.1f} s", flush=True)
    if args.verify and "gpt" in (args.source, args.target):
        verify_gpt(*((args.output, args.input) if args.source == "gpt" else (args.input, args.output)))
    elif args.verify:
        hf, megatron = (args.input, args.output) if args.target == "megatron" else (args.output, args.input)
        verify(hf, megatron, TOLERANCE if args.dtype is None else ROUNDING)


def _check(args: argparse.Namespace) -> None:
    """Find what is wrong with the flags."""
    if (args.source == "megatron") == (args.target == "megatron"):
        raise ConfigError(
            "one of the two formats is megatron", got=f"--from {args.source} --to {args.target}",
            legal="--from hf --to megatron, --from gpt --to megatron, and back",
        )  # fmt: skip
    if "gpt" in (args.source, args.target) and (args.dtype or args.pad_vocab_to != 1):
        raise ConfigError("--dtype and --pad-vocab-to go with hf")
    if args.target != "hf" and (args.like or args.hf_class or args.tokenizer or args.vocab_size):
        raise ConfigError("--like, --hf-class, --tokenizer and --vocab-size go with --to hf")
    if args.pad_vocab_to != 1 and args.target == "hf":
        raise ConfigError("--pad-vocab-to goes with --to megatron", legal="--vocab-size N cuts padding off")
    if args.pad_vocab_to < 1 or args.shard_gb <= 0:
        raise ConfigError("--pad-vocab-to and --shard-gb must be positive", got=f"{args.pad_vocab_to}, {args.shard_gb}")
    is_step = (args.input / ".metadata").is_file() or bool(layout.steps(args.input))
    if args.source == "hf" and is_step and not (args.input / companions.CONFIG).is_file():
        raise ConfigError(
            "a checkpoint of Megatron's, not a Hugging Face directory", got=f"--from hf {args.input}",
            legal="--from megatron --to hf; --from gpt --to megatron if it holds a GPTModel",
        )  # fmt: skip
    check_new(args.output, "the output")


class _Progress:
    """A bar on a terminal, otherwise a line every few seconds."""

    def __init__(self) -> None:
        self.total, self._last, self._bar, self._task = 0, time.monotonic(), None, None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("converting", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            print(f"converted {done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)
