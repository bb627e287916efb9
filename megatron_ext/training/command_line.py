"""From a command line to validated arguments: everything that can be wrong is found here, before any process group.

The model comes from `--preset`, from the checkpoint to be loaded, or from flags (`family.flags`). Its flags are put in
front of the user's, so that explicit flags win.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from math import lcm
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import tokenizer
from megatron_ext.checkpoint.atomic import check_new
from megatron_ext.checkpoint.checksums import verify_start
from megatron_ext.checkpoint.huggingface.hf_assets import check_tokenizer
from megatron_ext.checkpoint.start import Start, check_continues, find_start, tell_megatron
from megatron_ext.data.splits import check_splits, check_vocabulary
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.bootstrap import prepare
from megatron_ext.ops.dispatch import NAMES as SSM_BACKENDS
from megatron_ext.options import early_flags, readable
from megatron_ext.options.fields import add_options, read_options
from megatron_ext.options.help import program_name
from megatron_ext.options.unsupported import check_flags
from megatron_ext.reports.megatron_output import suppressed_output
from megatron_ext.training.job import Job, RunConfig
from megatron_ext.training.run_directory import check_save


def parse_command_line(job: Job, argv: Sequence[str] | None = None) -> RunConfig:
    """Parse and validate a command line, without starting anything.

    Args:
        job: The kind of run.
        argv: The command line without the program's name; `sys.argv` by default.

    Raises:
        ConfigError, DataError, CheckpointError: Something is wrong with it; nothing has been written.
    """
    given = early_flags.equals_form(sys.argv[1:] if argv is None else argv)
    check_flags(given)
    family = job.family
    early = early_flags.read_early(given, job.options, family.early_arguments())
    begins = find_start(early)
    model_flags, source = family.flags(early, begins)
    if early.dry_run:
        tp = early.tensor_model_parallel_size
        experts = early.expert_model_parallel_size * (early.expert_tensor_parallel_size or tp)
        layout = early.pipeline_model_parallel_size * lcm(tp * early.context_parallel_size, experts)
        os.environ.setdefault("WORLD_SIZE", str(layout))
    model = early_flags.read_early([*model_flags, *given], {}, family.early_arguments())
    offline = early.dry_run or job.offline(early)
    if offline and early.tokenizer_type is None and (rows := getattr(model, "padded_vocab_size", None)) is not None:
        model_flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows - 1)]
    _single_process()
    # Where nothing is started, no kernels are timed.
    prepare(early.ext_ssm_backend, None if early.dry_run else family.ssm_shape(model))
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import get_tokenizer, set_global_variables

    words = [*early_flags.default_flags(), *early_flags.vocab_flags(early), *job.defaults, *model_flags, *given]

    parsers: list[argparse.ArgumentParser] = []

    def extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_flags(parser, job)
        readable.patch_parser(parser)
        parsers.append(parser)
        return parser

    program, sys.argv = sys.argv, [program_name(job.name), *words]
    try:
        args = parse_args(extra)
    finally:
        sys.argv = program
    args.dist_ckpt_optim_fully_reshardable |= args.ext_optim_sharding == "fully_reshardable"
    family.check(args, loads=job.makes_new)
    if not (args.skip_train or early.dry_run or args.train_samples or (args.train_iters or 0) > 0):
        raise ConfigError("nothing to train", got=f"--train-iters {args.train_iters}", legal="a positive number")
    _check_saving(args)
    if not args.save:  # a rerun ends with a checkpoint of what led to a NaN, and there is no place for one
        if early.rerun_mode not in (None, "disabled"):
            raise ConfigError("--rerun-mode saves what led to a NaN", got="no --save", legal="--save DIR, or disabled")
        args.rerun_mode = "disabled"
    if args.save and not early.dry_run:
        if job.makes_new:
            check_new(Path(args.save))
        else:
            check_save(Path(args.save), job.name, early.load)
    tell_megatron(begins, args)
    with readable.readable(args, parsers[0]), suppressed_output():
        validate_args(args, {})
    if family.reads_text:
        _check_tokenizer(args, begins)
        if not offline:
            check_splits(args, job.measures)
    if args.tokenizer_type is None:
        given_by_data = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR/tokenizer"
        raise ConfigError("no tokenizer given", legal=f"{given_by_data}, as `megatron-ext data` prints")
    with readable.readable(args, parsers[0]), suppressed_output():
        set_global_variables(args)
    model: Any = family.from_args(args)
    family.check_layout(args, model)
    if family.reads_text:
        in_use: Any = get_tokenizer()
        said = any(word.partition("=")[0] == "--vocab-size" for word in given)
        if said and args.tokenizer_type == "HuggingFaceTokenizer" and args.vocab_size != in_use.vocab_size:
            raise ConfigError(
                "--vocab-size is not the tokenizer's", got=args.vocab_size,
                legal=f"{in_use.vocab_size}, or none; --padded-vocab-size N for an embedding of more rows",
            )  # fmt: skip
        args.vocab_size = in_use.vocab_size
        if not offline:
            check_vocabulary(args, args.vocab_size, model.padded_vocab_size)
    if not isinstance(model, Architecture):  # whose checkpoints say it by Megatron's own arguments
        args.ext_family, args.ext_model = family.name, model.to_dict() | {"num_parameters": model.num_parameters()}
    check_continues(begins, args)
    with readable.readable(args, parsers[0]), suppressed_output():
        family.config(args, model)  # whose fields refuse one another, too
    if begins is not None:  # last, because it takes as long as reading it
        verify_start(begins.step, args, begins.continues)
    options = {prefix: read_options(args, options, prefix) for prefix, options in job.options.items()}
    return RunConfig(job, args, model, early.dry_run, options, source, begins)


def add_flags(parser: argparse.ArgumentParser, job: Job) -> None:
    """Those that are not Megatron's: of every job, of the family of its models, and its own."""
    for prefix, options in job.options.items():
        add_options(parser, options, prefix)
    job.family.add_flags(parser)
    group = parser.add_argument_group("megatron_ext", "flags of every job")
    group.add_argument("--preset", metavar="NAME", help="of `megatron-ext presets`, or a checkpoint directory")
    group.add_argument("--dry-run", action="store_true", help="validate, print model, memory and layout, and stop")
    kernels = "state-space kernels; auto: by device, dtype and shape, and where mamba_ssm runs too, the faster"
    group.add_argument("--ext-ssm-backend", choices=SSM_BACKENDS, default="auto", help=kernels)
    saved = "form in which the distributed optimizer is saved; dp_reshardable stays on its TP and PP"
    forms = ("fully_reshardable", "dp_reshardable")
    group.add_argument("--ext-optim-sharding", choices=forms, default=forms[0], help=saved)


def _check_saving(args: Namespace) -> None:
    """Refuse checkpoints that nothing here reads, the run that wrote them included."""
    if args.ckpt_format != "torch_dist":
        raise ConfigError(
            "checkpoints of this format are read by no command", got=f"--ckpt-format {args.ckpt_format}",
            legal="torch_dist, which is the default",
        )  # fmt: skip
    if args.non_persistent_ckpt_type is not None or args.non_persistent_save_interval is not None:
        raise ConfigError(
            "a run does not go on from non-persistent checkpoints",
            got="--non-persistent-ckpt-type or --non-persistent-save-interval",
            legal="--save-interval, with --save-retain-interval to keep only some",
        )


def _check_tokenizer(args: Namespace, begins: Start | None) -> None:
    """The tokenizer on the command line must exist, and be the checkpoint's; it is noted in the run's checkpoints."""
    model = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and model is not None and not Path(model).exists():
        raise DataError("--tokenizer-model: no such tokenizer", got=model, legal="a directory with tokenizer.json")
    if model is not None and Path(model).exists():  # what is saved must mean the same from everywhere
        args.tokenizer_model = str(Path(model).absolute())
        if args.tokenizer_type == "HuggingFaceTokenizer":
            check_tokenizer(Path(model))
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ConfigError(
            "--tokenizer-type NullTokenizer knows no tokens", legal="--vocab-size N, as many as there are"
        )
    args.tokenizer_fingerprint = tokenizer.of_run(args)
    if begins is not None:
        tokenizer.check(begins.step.path, tokenizer.given(args), "the checkpoint")


def _single_process() -> None:
    """Without torchrun, this process is a world of its own."""
    if "RANK" in os.environ:
        return
    # Nobody else has to know the port, so whoever listens on it takes a free one: one chosen here may be gone by then.
    os.environ.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("WORLD_SIZE", "1")
