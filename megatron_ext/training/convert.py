"""`megatron-ext convert`: checkpoints from and to Hugging Face directories and GPTModels, and the proof of equality."""

import argparse
import gc
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import gpt, layout
from megatron_ext.checkpoint.huggingface import companions, families
from megatron_ext.checkpoint.huggingface.coded import CodedFamily
from megatron_ext.checkpoint.huggingface.convert import TYPES, to_hf, to_megatron
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.training.launch import Job, launch, silenced

FORMATS = "the format of the input: hf, Megatron in the pattern form of all programs here, or Megatron's GPTModel"
LINE_SECONDS = 10
TOKENS = 64
TOLERANCE = 1e-4
ROUNDING = 0.05  # of the largest logit, where weights were converted to another type
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905, four papers changed what people thought about light, atoms, "
    "motion and mass. def add(a, b): return a + b  # and a comment. Was kostet das? 12 Euro 50."
)
JOB = Job(
    "convert",
    defaults=(
        "--eval-iters", "0", "--train-iters", "1", "--lr", "0", "--skip-train",
        "--no-load-optim", "--no-load-rng", "--finetune", "--mock-data",
    ),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    formats = ("hf", "megatron", "gpt")
    parser.add_argument("input", type=Path, help="a Hugging Face directory, or a checkpoint of Megatron's")
    parser.add_argument("output", type=Path, help="a new directory")
    parser.add_argument("--from", dest="source", choices=formats, required=True, help=FORMATS)
    parser.add_argument("--to", dest="target", choices=formats, required=True, help="the format of the output")
    parser.add_argument("--dtype", choices=list(TYPES), help="the type of the weights; by default the one they have")
    parser.add_argument("--verify", action="store_true", help="load both models and compare their logits")
    to = parser.add_argument_group("--to megatron")
    to.add_argument("--pad-vocab-to", type=int, default=1, metavar="N", help="add zero rows up to a multiple of N")
    back = parser.add_argument_group("--to hf")
    like = "take configuration and tokenizer from here, a Hugging Face directory or a checkpoint converted from one"
    back.add_argument("--like", type=Path, metavar="DIR", help=like)
    back.add_argument("--hf-class", metavar="NAME", help="what it is to be: " + ", ".join(families.FAMILIES))
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
                args.input, args.output, like=args.like, family=args.hf_class, vocab_size=args.vocab_size,
                dtype=dtype, shard_bytes=int(args.shard_gb * 1e9), progress=progress,
            )  # fmt: skip
            if isinstance(family, CodedFamily):
                code = f"{family.module}.py beside the weights (trust_remote_code=True)"
                print(f"no class of transformers can express it: {family.name}, with {code}", flush=True)
    print(f"wrote {args.output}: {progress.total / 1e9:.2f} GB in {time.monotonic() - start:.1f} s", flush=True)
    if args.verify and "gpt" in (args.source, args.target):
        verify_gpt(*((args.output, args.input) if args.source == "gpt" else (args.input, args.output)))
    elif args.verify:
        hf, megatron = (args.input, args.output) if args.target == "megatron" else (args.output, args.input)
        if args.dtype is None:
            verify(hf, megatron)
        else:
            verify(hf, megatron, tolerance=ROUNDING)


def _check(args: argparse.Namespace) -> None:
    """Find what is wrong with the flags."""
    if (args.source == "megatron") == (args.target == "megatron"):
        raise ConfigError(
            "one of the two formats is megatron", got=f"--from {args.source} --to {args.target}",
            legal="--from hf --to megatron, --from gpt --to megatron, and back",
        )  # fmt: skip
    if "gpt" in (args.source, args.target) and (args.dtype or args.pad_vocab_to != 1):
        raise ConfigError("--dtype and --pad-vocab-to go with hf")
    if args.target != "hf" and (args.like or args.hf_class or args.vocab_size):
        raise ConfigError("--like, --hf-class and --vocab-size go with --to hf")
    if args.pad_vocab_to != 1 and args.target == "hf":
        raise ConfigError("--pad-vocab-to goes with --to megatron", legal="--vocab-size N cuts padding off")
    if args.pad_vocab_to < 1 or args.shard_gb <= 0:
        raise ConfigError("--pad-vocab-to and --shard-gb must be positive", got=f"{args.pad_vocab_to}, {args.shard_gb}")


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


def verify(hf: Path, megatron: Path, tolerance: float = TOLERANCE) -> float:
    """Compare the logits of the two models in fp32, on random tokens and, where there is a tokenizer, on text.

    Args:
        hf: A directory that transformers loads.
        megatron: A checkpoint.
        tolerance: The largest difference that passes, relative to the largest logit where that is above 1.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: It is larger than the tolerance.
        ConfigError: transformers does not know the layout.
    """
    config = companions.read_config(hf)
    if "model_type" not in config:
        raise ConfigError("--verify: transformers does not load this layout", got=hf, legal="a model of transformers'")
    context = config.get("max_position_embeddings", TOKENS)
    random = torch.randint(config["vocab_size"], (2, min(TOKENS, context)), generator=torch.Generator().manual_seed(0))
    inputs = {"random tokens": random}
    if (text := _text(hf)) is not None:
        inputs["text"] = text[:, :context]
    theirs = hf_logits(hf, list(inputs.values()))
    ours = megatron_logits(megatron, list(inputs.values()))
    return _compared(list(inputs), theirs, ours, tolerance)


def verify_gpt(pattern: Path, twin: Path) -> float:
    """Compare the logits of a checkpoint and of Megatron's own GPTModel in fp32, on random tokens; see `verify`."""
    arch = layout.architecture(layout.find(pattern).path)
    length = min(TOKENS, arch.max_position_embeddings)
    inputs = torch.randint(arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ours, theirs = megatron_logits(pattern, [inputs], twin)
    return _compared(["random tokens"], [theirs], [ours], TOLERANCE)


def _compared(names: list[str], theirs: list[Tensor], ours: list[Tensor], tolerance: float) -> float:
    largest = 0.0
    for name, left, right in zip(names, theirs, ours, strict=True):
        difference = float((left - right[..., : left.shape[-1]]).abs().max())
        scale = max(1.0, float(left.abs().max()))
        print(f"{name}: largest difference of logits {difference:.2e}, largest logit {scale:.2f}", flush=True)
        largest = max(largest, difference)
        if not difference <= tolerance * scale:
            raise CheckpointError(
                f"the models differ on {name}", got=f"{difference:.2e}", legal=f"at most {tolerance * scale:.0e}"
            )
    return largest


def _text(directory: Path) -> Tensor | None:
    if not (directory / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    return torch.tensor([Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids])


@torch.no_grad()
def hf_logits(directory: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Logits (b, s, v) of transformers' model in fp32 for each batch of tokens (b, s)."""
    from transformers import AutoModelForCausalLM

    ours = families.holds_our_code(directory, companions.read_config(directory))  # and no other is run
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=ours).eval()
    logits = [model(tokens).logits for tokens in inputs]
    del model
    gc.collect()
    return logits


@torch.no_grad()
def megatron_logits(checkpoint: Path, inputs: list[Tensor], twin: Path | None = None) -> list[Tensor]:
    """Logits (b, s, v) of Megatron's model in fp32 for each batch of tokens (b, s); starts Megatron in this process.

    Args:
        checkpoint: The model.
        inputs: The batches.
        twin: The same model as a GPTModel, whose logits are appended.
    """
    length = max(tokens.shape[1] for tokens in inputs)
    flags = ["--load", str(checkpoint), "--seq-length", str(length), "--global-batch-size", "1"]
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1"]
    started = launch(JOB, [*flags, *words])
    from megatron_ext.training.evaluate import load_gpt, load_model

    with silenced(started.args), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of being alone
        (model,) = load_model(started)
    logits = _logits(model, inputs)
    if twin is not None:
        del model
        gc.collect()
        with silenced(started.args), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (model,) = load_gpt(started, twin)
        logits += _logits(model, inputs)
    torch.distributed.destroy_process_group()
    return logits


def _logits(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    device = torch.cuda.current_device()
    logits = []
    for tokens in inputs:
        positions = torch.arange(tokens.shape[1], device=device)[None].expand_as(tokens)
        logits.append(model(tokens.to(device), positions, None).float().cpu())
    return logits
