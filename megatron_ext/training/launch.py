"""From a command line to validated arguments: everything that can be wrong is found here, before any process group.

The model comes from `--preset` (a name, or a checkpoint whose architecture is taken), from the checkpoint to be
loaded, or from Megatron's own flags. Its flags are put in front of the user's, so that explicit flags win.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext import platform
from megatron_ext.arguments import add_options, read_options
from megatron_ext.checkpoint.resume import (
    architecture_on_disk,
    check_experts,
    check_same_model,
    has_checkpoint,
    resume_point,
    sequence_length_on_disk,
)
from megatron_ext.errors import ConfigError, DataError, nearest
from megatron_ext.models.backend import prepare
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import MOE, Pattern
from megatron_ext.models.pattern import parse as parse_pattern
from megatron_ext.models.presets import preset
from megatron_ext.ssm.dispatch import NAMES as SSM_BACKENDS
from megatron_ext.ssm.fastest import Shape
from megatron_ext.training.context import extension
from megatron_ext.training.directory import check_save

VOCAB_MULTIPLE = 128
STOPPABLE = ("--exit-signal-handler",)
"""Of a job that trains: SIGTERM and Ctrl-C let it finish its step, save, and end well."""


@dataclass(frozen=True)
class Job:
    """What kind of run this is.

    Attributes:
        name: `pretrain`, `prune`, `distill`: written into the run directory, which belongs to one kind.
        options: Our option dataclasses by flag prefix.
        defaults: Megatron flags that this job sets unless the user does.
        offline: Our flags under which the job reads no data, and so needs no tokenizer.
    """

    name: str
    options: dict[str, type] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A validated command line.

    Attributes:
        job: The kind of run.
        args: Megatron's namespace, our flags among them.
        architecture: The model.
        dry_run: Whether to print and stop.
        options: Our options by prefix, as instances of the job's dataclasses.
        model_source: Where the architecture came from, for people.
    """

    job: Job
    args: Namespace
    architecture: Architecture
    dry_run: bool
    options: dict[str, Any]
    model_source: str

    @property
    def pattern(self) -> Pattern:
        """The layer pattern with this run's pipeline borders."""
        return parse_pattern(self.args.hybrid_layer_pattern)


def _early_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--pretrained-checkpoint", type=Path)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    parser.add_argument("--make-vocab-size-divisible-by", type=int)
    parser.add_argument("--padded-vocab-size", type=int)
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--tokenizer-type")
    parser.add_argument("--ext-ssm-backend", default="auto")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--max-position-embeddings", type=int)
    parser.add_argument("--rotary-base", type=int)
    parser.add_argument("--use-rope-scaling", action="store_true")
    parser.add_argument("--mamba-num-heads", type=int)
    parser.add_argument("--mamba-head-dim", type=int, default=64)
    parser.add_argument("--mamba-state-dim", type=int, default=128)
    parser.add_argument("--mamba-num-groups", type=int, default=8)
    return parser


def _layer_shape(words: Sequence[str]) -> Shape:
    """What a Mamba-2 layer of the model is on one tensor rank, to choose kernels by."""
    told, _ = _early_parser().parse_known_args(words)
    tp = told.tensor_model_parallel_size
    heads = told.mamba_num_heads or Shape.heads
    return Shape(
        max(1, heads // tp), told.mamba_head_dim, told.mamba_state_dim, max(1, told.mamba_num_groups // tp),
        min(told.seq_length or Shape.tokens, Shape.tokens),
    )  # fmt: skip


def _equals_form(argv: Sequence[str]) -> list[str]:
    """A pattern may begin with "-", which argparse would take for a flag: `--hybrid-layer-pattern=-M...`."""
    argv, joined = list(argv), []
    while argv:
        word = argv.pop(0)
        if word == "--hybrid-layer-pattern" and argv:
            word += "=" + argv.pop(0)
        joined.append(word)
    return joined


def architecture_of(source: str) -> tuple[Architecture, bool]:
    """The architecture of a preset or a checkpoint directory, and whether it came from a checkpoint.

    Raises:
        ConfigError: It is neither.
        CheckpointError: The directory holds no readable checkpoint.
    """
    if os.sep in source or Path(source).is_dir():
        return architecture_on_disk(Path(source)), True
    return preset(source).architecture, False


def _is_its_pattern(pattern: str | None, checkpoint: Path) -> bool:
    """Whether a pattern on the command line only adds pipeline borders to the checkpoint's own."""
    return pattern is None or parse_pattern(pattern).units == architecture_on_disk(checkpoint).pattern


def _model_flags(early: Namespace) -> tuple[list[str], str]:
    """Flags of the model that `--preset` or the checkpoint to load names, and where they came from."""
    source = early.preset
    if source is None:
        for directory in (early.load, early.pretrained_checkpoint):
            if directory is not None and has_checkpoint(directory):
                source = str(directory) if _is_its_pattern(early.hybrid_layer_pattern, directory) else None
                break
    if source is None:
        return [], "flags"
    architecture, from_checkpoint = architecture_of(source)
    flags = architecture.to_flags()
    if not from_checkpoint and (early.tokenizer_model or early.tokenizer_type):
        # A preset's vocabulary is only its default: the tokenizer in use decides.
        at = flags.index("--padded-vocab-size")
        del flags[at : at + 2]
    if from_checkpoint:
        flags += extension(architecture, early)
        if length := sequence_length_on_disk(Path(source)):
            flags += ["--seq-length", str(length)]
    return flags, source


def _default_flags() -> list[str]:
    # None of the models this product is about uses dropout; Megatron's default is 0.1.
    flags = ["--ckpt-format", "torch_dist", "--hidden-dropout", "0", "--attention-dropout", "0"]
    # Megatron has no defaults for these, and fails late and obscurely without them.
    flags += ["--micro-batch-size", "1", "--eval-interval", "1000", "--save-interval", "1000"]
    # Attention is causal by itself; a mask is a square of the sequence, 17 GB at 131,072 tokens.
    flags += ["--no-create-attention-mask-in-dataloader"]
    on_cpu = platform.device_type() == "cpu"
    if on_cpu:
        flags += ["--distributed-backend", "gloo", "--num-workers", "0"]
        flags += ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"]  # torch.compile
    if on_cpu or importlib.util.find_spec("transformer_engine") is None:
        # CUDA kernels of Transformer Engine and Apex.
        flags += ["--no-gradient-accumulation-fusion", "--no-rope-fusion"]
        flags += ["--no-masked-softmax-fusion", "--no-persist-layer-norm"]
    return flags


def _vocab_flags(early: Namespace) -> list[str]:
    # Megatron pads to a multiple of (divisor x TP). The model must not depend on TP, so the product is fixed.
    if early.make_vocab_size_divisible_by is not None:
        return []
    tp = early.tensor_model_parallel_size
    multiple = VOCAB_MULTIPLE if VOCAB_MULTIPLE % tp == 0 else VOCAB_MULTIPLE * tp
    return ["--make-vocab-size-divisible-by", str(multiple // tp)]


def _pipeline(pattern: str, stages: int) -> str:
    """The pattern with pipeline borders, chosen evenly between blocks where the user gave none."""
    parsed = parse_pattern(pattern)
    if stages == 1 or parsed.borders:
        return str(parsed)
    return str(parsed.split(stages))


@contextlib.contextmanager
def _readable_refusals():
    """Megatron refuses flags by assertion; say so in our form."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        if isinstance(error, ConfigError | DataError):
            raise
        # Many of Megatron's assertions have no message: then the condition says it best.
        reason = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"Megatron refuses this combination of flags: {reason}") from error


def launch(job: Job, argv: Sequence[str] | None = None) -> Launch:
    """Parse and validate a command line, without starting anything.

    Args:
        job: The kind of run.
        argv: The command line without the program's name; `sys.argv` by default.

    Raises:
        ConfigError, DataError, CheckpointError: Something is wrong with it; nothing has been written.
    """
    given = _equals_form(sys.argv[1:] if argv is None else argv)
    early, _ = _early_parser().parse_known_args(given)
    if early.hybrid_layer_pattern is not None:
        parse_pattern(early.hybrid_layer_pattern)
    model_flags, source = _model_flags(early)
    if early.dry_run:
        tp = early.tensor_model_parallel_size
        experts = early.expert_model_parallel_size * (early.expert_tensor_parallel_size or tp)
        layout = early.pipeline_model_parallel_size * lcm(tp * early.context_parallel_size, experts)
        os.environ.setdefault("WORLD_SIZE", str(layout))
    offline = early.dry_run or any(word.split("=")[0] in job.offline for word in given)
    if offline and early.tokenizer_type is None and "--padded-vocab-size" in model_flags:
        words = model_flags[model_flags.index("--padded-vocab-size") + 1]
        model_flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(int(words) - 1)]
    _single_process()
    prepare(early.ext_ssm_backend, _layer_shape([*model_flags, *given]))
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    flags = [*_default_flags(), *_vocab_flags(early), *job.defaults, *model_flags, *given]

    def extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        group = parser.add_argument_group("megatron_ext", f"the job: {job.name}")
        group.add_argument("--preset", help="a preset's name (see `megatron-ext presets`) or a checkpoint directory")
        group.add_argument("--dry-run", action="store_true", help="validate, print model, memory and layout, and stop")
        sizes = "sizes that differ from layer to layer, such as 'ffn_hidden_size=96,80 mamba_num_heads=8,4'"
        group.add_argument("--ext-layer-sizes", metavar="SIZES", help=sizes)
        kernels = "state-space kernels; auto: by device, dtype and shape, and where mamba_ssm runs too, the faster"
        group.add_argument("--ext-ssm-backend", choices=SSM_BACKENDS, default="auto", help=kernels)
        for prefix, options in job.options.items():
            add_options(parser, options, prefix)
        _mend(parser)
        return parser

    program, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        args = parse_args(extra)
    finally:
        sys.argv = program
    _check_model(args)
    if not (args.skip_train or early.dry_run or args.train_samples or (args.train_iters or 0) > 0):
        raise ConfigError("nothing to train", got=f"--train-iters {args.train_iters}", legal="a positive number")
    if args.save and not early.dry_run:
        check_save(Path(args.save), job.name, early.load)
    _choose_step(args, early)
    with _readable_refusals(), silenced(args):
        validate_args(args, {})
    _check_data(args, early.dry_run)
    with _readable_refusals(), silenced(args):
        set_global_variables(args)
    # The tokenizer may have decided the vocabulary.
    architecture = Architecture.from_args(args)
    _check_layout(args, architecture)
    options = {prefix: read_options(args, options, prefix) for prefix, options in job.options.items()}
    return Launch(job, args, architecture, early.dry_run, options, source)


def _mend(parser: argparse.ArgumentParser) -> None:
    """Refuse wrong flags in one line instead of Megatron's 600 of usage, and make its `--help` work."""
    names = [name for action in parser._actions for name in action.option_strings]

    def refuse(message: str) -> NoReturn:
        words = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        raise ConfigError(message, legal=nearest(words[0], names).split("? ")[0] + "?" if words else "see --help")

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.help:  # a bare % in one of Megatron's texts
            action.help = re.sub(r"%(%|\(\w+\)s)?", lambda found: found[0] if found[1] else "%%", action.help)


def _check_model(args: Namespace) -> None:
    """Find what is wrong with the model before Megatron does, in words that help."""
    if args.hybrid_layer_pattern is None:
        empty = f"--load {args.load}, where no checkpoint is" if args.load else "none of the flags"
        raise ConfigError(
            "no model given", got=empty, legal="--preset NAME, --preset CHECKPOINT, or --hybrid-layer-pattern"
        )
    args.hybrid_layer_pattern = _pipeline(args.hybrid_layer_pattern, args.pipeline_model_parallel_size)
    if args.padded_vocab_size is None and args.vocab_size is None:
        return  # the tokenizer will say
    _check_layout(args, Architecture.from_args(args))


def _check_layout(args: Namespace, architecture: Architecture) -> None:
    """Find what does not divide."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    architecture.validate(tp=tp, pp=pp, ep=ep, etp=etp)
    if MOE in architecture.pattern and tp > 1 and not args.sequence_parallel:
        # Otherwise every tensor rank sends the same tokens to the experts.
        raise ConfigError(f"experts under tensor parallel {tp} need sequence parallelism", legal="--sequence-parallel")


def _choose_step(args: Namespace, early: Namespace) -> None:
    """Tell Megatron which step to load, so that it neither exits silently nor starts from random weights.

    Raises:
        CheckpointError: A directory that was asked for has no complete checkpoint.
    """
    source = None
    if early.load is not None and has_checkpoint(early.load):
        source = early.load
    elif early.pretrained_checkpoint is not None:
        source = early.pretrained_checkpoint
    elif early.load is not None and early.load != early.save:
        source = early.load  # there is nothing, which is an error; but --load = --save is how a job starts and goes on
    if source is None:
        return
    step = resume_point(source)
    if args.ckpt_step is None and not step.is_release:
        args.ckpt_step = step.iteration
    if source == early.load and not (step.is_release or args.finetune or args.no_load_optim):
        check_experts(step, args)
        check_same_model(step, args)
    args.exit_on_missing_checkpoint = True


def _check_data(args: Namespace, dry_run: bool) -> None:
    """The tokenizer on the command line must exist, and so must every data prefix (not in a dry run)."""
    model = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and model is not None and not Path(model).exists():
        raise DataError("--tokenizer-model: no such tokenizer", got=model, legal="a directory with tokenizer.json")
    if dry_run or args.mock_data:
        return
    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for word in getattr(args, flag) or []:
            with contextlib.suppress(ValueError):
                float(word)  # a blend's weight
                continue
            missing = [f"{word}{ending}" for ending in (".idx", ".bin") if not Path(f"{word}{ending}").is_file()]
            if missing:
                raise DataError(
                    f"--{flag.replace('_', '-')}: no such data", got=", ".join(missing),
                    legal="a prefix made by `megatron-ext data --out DIR`: DIR/text_document",
                )  # fmt: skip


@contextlib.contextmanager
def silenced(args: Namespace) -> Iterator[None]:
    """Without what Megatron prints, such as its several hundred arguments, which are in config.yaml."""
    if os.environ.get("MEGATRON_EXT_VERBOSE"):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _single_process() -> None:
    """Without torchrun, this process is a world of its own."""
    if "RANK" in os.environ:
        return
    # Nobody else has to know the port, so whoever listens on it takes a free one: one chosen here may be gone by then.
    os.environ.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("WORLD_SIZE", "1")


def main(run: Callable[[], None]) -> int:
    """Run a program; a user's mistake becomes one readable message and exit status 2."""
    from megatron_ext.errors import MegatronExtError

    if int(os.environ.get("RANK", "0")) == 0:
        ours = logging.getLogger("megatron_ext")
        ours.setLevel(logging.INFO)
        ours.propagate = False  # Megatron's handler would say it again
        ours.handlers = [logging.StreamHandler()]
    try:
        run()
    except MegatronExtError as error:
        import torch.distributed as dist

        # Before there are process groups every rank finds the same; afterwards perhaps only this one.
        if int(os.environ.get("RANK", "0")) == 0 or dist.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
