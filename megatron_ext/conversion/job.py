"""`megatron-ext convert`: checkpoints from and to Hugging Face directories, GGUF files and GPTModels."""

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path

from megatron_ext.checkpoint import gpt, layout, ranks
from megatron_ext.checkpoint.atomic import check_new
from megatron_ext.checkpoint.gguf import source as gguf
from megatron_ext.checkpoint.gguf.convert import to_gguf
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.convert import TYPES, to_hf, to_megatron
from megatron_ext.checkpoint.huggingface.remote_code import RemoteCodeFamily
from megatron_ext.conversion import hub
from megatron_ext.conversion.verify import ROUNDING, TOLERANCE, verify, verify_gguf, verify_gpt
from megatron_ext.errors import ConfigError
from megatron_ext.reports.progress import Progress


def main(args: argparse.Namespace) -> None:
    """Convert, and verify if asked to; what torchrun started shares the tensors."""
    if args.source == "hf":
        args.input = hub.directory(args.input)
    _check(args)
    with ranks.joined():
        made = _convert(args)
    if not args.verify:
        return
    tolerance = TOLERANCE if args.dtype is None else ROUNDING
    if "gpt" in (args.source, args.target):
        verify_gpt(*((args.output, args.input) if args.source == "gpt" else (args.input, args.output)))
    elif args.source == "gguf":
        verify_gguf(gguf.find(args.input), args.output, tolerance)
    elif args.target == "gguf":
        verify_gguf(made, args.input, tolerance)
    else:
        hf, megatron = (args.input, args.output) if args.target == "megatron" else (args.output, args.input)
        verify(hf, megatron, tolerance)


def _convert(args: argparse.Namespace) -> Path:
    """Convert; what was made, a directory or a GGUF file."""
    dtype = TYPES.get(args.dtype)
    start, made = time.monotonic(), args.output
    notes: list[str] = []
    back = {"like": args.like, "family": args.hf_class, "tokenizer": args.tokenizer, "vocab_size": args.vocab_size}
    with Progress("converted", unit="bytes") as progress:
        if args.source == "gpt":
            gpt.to_pattern(args.input, args.output, progress.update)
        elif args.target == "gpt":
            gpt.to_gpt(args.input, args.output, progress.update)
        elif args.target == "megatron":
            with gguf.opened(args.input, args.tokenizer) if args.source == "gguf" else nullcontext(args.input) as model:
                to_megatron(model, args.output, dtype=dtype, vocab_multiple=args.pad_vocab_to, progress=progress.update)
        elif args.target == "gguf":
            made = to_gguf(args.input, args.output, kind=args.dtype, progress=progress.update, **back)
        else:
            size = int((args.shard_gb or 5) * 1e9)
            family = to_hf(args.input, args.output, dtype=dtype, shard_bytes=size, progress=progress.update, **back)
            if isinstance(family, RemoteCodeFamily):
                code = f"{family.module}.py beside the weights (trust_remote_code=True)"
                notes.append(f"no class of transformers can express it: {family.name}, with {code}")
            if not hf_assets.tokenizer_files(args.output):
                notes.append("no tokenizer was written: the model has none")
    notes.append(f"wrote {made}: {progress.done / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")
    if ranks.rank() == 0:
        print(*notes, sep="\n", flush=True)
    return made


def _check(args: argparse.Namespace) -> None:
    """Find what is wrong with the flags."""
    if args.source == "hf" and args.target == "megatron" and gguf.is_gguf(args.input):
        args.source = "gguf"
    if (args.source == "megatron") == (args.target == "megatron"):
        raise ConfigError(
            "one of the two formats is megatron", got=f"--from {args.source} --to {args.target}",
            legal="--from hf --to megatron, --from gguf --to megatron, --from gpt --to megatron, and back",
        )  # fmt: skip
    if "gpt" in (args.source, args.target) and (args.dtype or args.pad_vocab_to != 1):
        raise ConfigError("--dtype and --pad-vocab-to go with hf and gguf")
    if args.dtype == "q8_0" and args.target != "gguf":
        raise ConfigError("--dtype q8_0 goes with --to gguf", legal=", ".join(TYPES))
    back = args.target in ("hf", "gguf")
    if not back and (args.like or args.hf_class or args.vocab_size):
        raise ConfigError("--like, --hf-class and --vocab-size go with --to hf and --to gguf")
    if args.tokenizer and not back and args.source != "gguf":
        raise ConfigError("--tokenizer goes with --to hf, --to gguf and --from gguf")
    if args.shard_gb is not None and args.target != "hf":
        raise ConfigError("--shard-gb goes with --to hf")
    if args.pad_vocab_to != 1 and args.target != "megatron":
        raise ConfigError("--pad-vocab-to goes with --to megatron", legal="--vocab-size N cuts padding off")
    if args.verify and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--verify runs both models in one process", legal="--verify without torchrun")
    is_step = (args.input / ".metadata").is_file() or bool(layout.steps(args.input))
    if args.source == "hf" and is_step and not (args.input / hf_assets.CONFIG).is_file():
        raise ConfigError(
            "a checkpoint of Megatron's, not a Hugging Face directory", got=f"--from hf {args.input}",
            legal="--from megatron --to hf; --from gpt --to megatron if it holds a GPTModel",
        )  # fmt: skip
    if args.target == "gguf" and args.output.suffix == ".gguf":
        raise ConfigError(
            "the output is a directory, in which the file gets its name", got=args.output,
            legal=args.output.with_suffix(""),
        )  # fmt: skip
    check_new(args.output, "the output")
