"""`megatron-ext convert`: checkpoints from and to Hugging Face directories and GPTModels."""

import argparse
import os
import time
from pathlib import Path

from megatron_ext.checkpoint import gpt, layout, ranks
from megatron_ext.checkpoint.atomic import check_new
from megatron_ext.checkpoint.huggingface import families, hf_assets
from megatron_ext.checkpoint.huggingface.convert import TYPES, to_hf, to_megatron
from megatron_ext.checkpoint.huggingface.remote_code import RemoteCodeFamily
from megatron_ext.conversion.verify import ROUNDING, TOLERANCE, verify, verify_gpt
from megatron_ext.errors import ConfigError
from megatron_ext.reports.progress import Progress

FORMATS = "the format of the input: hf, Megatron in the pattern form of all programs here, or Megatron's GPTModel"


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
    """Convert, and verify if asked to; what torchrun started shares the tensors."""
    _check(args)
    with ranks.joined():
        _convert(args)
    if not args.verify:
        return
    if "gpt" in (args.source, args.target):
        verify_gpt(*((args.output, args.input) if args.source == "gpt" else (args.input, args.output)))
    else:
        hf, megatron = (args.input, args.output) if args.target == "megatron" else (args.output, args.input)
        verify(hf, megatron, TOLERANCE if args.dtype is None else ROUNDING)


def _convert(args: argparse.Namespace) -> None:
    dtype = TYPES[args.dtype] if args.dtype else None
    start = time.monotonic()
    notes: list[str] = []
    with Progress("converted", unit="bytes") as progress:
        if args.source == "gpt":
            gpt.to_pattern(args.input, args.output, progress.update)
        elif args.target == "gpt":
            gpt.to_gpt(args.input, args.output, progress.update)
        elif args.target == "megatron":
            to_megatron(
                args.input, args.output, dtype=dtype, vocab_multiple=args.pad_vocab_to, progress=progress.update
            )
        else:
            family = to_hf(
                args.input, args.output, like=args.like, family=args.hf_class, tokenizer=args.tokenizer,
                vocab_size=args.vocab_size, dtype=dtype, shard_bytes=int(args.shard_gb * 1e9), progress=progress.update,
            )  # fmt: skip
            if isinstance(family, RemoteCodeFamily):
                code = f"{family.module}.py beside the weights (trust_remote_code=True)"
                notes.append(f"no class of transformers can express it: {family.name}, with {code}")
            if not hf_assets.tokenizer_files(args.output):
                notes.append("no tokenizer was written: the model has none")
    notes.append(f"wrote {args.output}: {progress.done / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")
    if ranks.rank() == 0:
        print(*notes, sep="\n", flush=True)


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
    if args.verify and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--verify runs both models in one process", legal="--verify without torchrun")
    is_step = (args.input / ".metadata").is_file() or bool(layout.steps(args.input))
    if args.source == "hf" and is_step and not (args.input / hf_assets.CONFIG).is_file():
        raise ConfigError(
            "a checkpoint of Megatron's, not a Hugging Face directory", got=f"--from hf {args.input}",
            legal="--from megatron --to hf; --from gpt --to megatron if it holds a GPTModel",
        )  # fmt: skip
    check_new(args.output, "the output")
