"""Caches of a teacher on the command line: what writing and reading one asks for, checked before any process group."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout, tokenizer
from megatron_ext.checkpoint.outputs import check_writable
from megatron_ext.distillation.logit_cache.cache import Cache, begin
from megatron_ext.distillation.logit_cache.manifest import Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader
from megatron_ext.distillation.options import compared
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.lm_head.objective import Objective
from megatron_ext.reports.provenance import git_commit, versions
from megatron_ext.training.job import RunConfig


def command_line(argv: Sequence[str], early: argparse.Namespace) -> list[str]:
    """The command line of a distillation; where a cache is written, the teacher's model and no training added to it.

    Args:
        argv: The command line.
        early: Its early flags, the job's options among them.

    Raises:
        ConfigError: A cache is to be written, and the teacher is missing or the model comes from elsewhere.
    """
    if early.distill_cache_write is None:
        return list(argv)
    if early.distill_teacher is None:
        raise ConfigError("--distill-cache-write needs the teacher", legal="--distill-teacher DIR")
    others = ("--load", "--save", "--pretrained-checkpoint", "--preset", "--distill-cache")
    if given := [flag for flag in others if getattr(early, flag[2:].replace("-", "_")) is not None]:
        raise ConfigError(
            "--distill-cache-write runs the teacher alone, and nothing is trained", got=", ".join(given),
            legal="--distill-teacher, --distill-top-k, --distill-temperature, --distill-cache-dtype, data and layout",
        )  # fmt: skip
    # A path is no preset's name, whatever the directory is called.
    return [*argv, "--preset", str(Path(early.distill_teacher).absolute()), "--skip-train"]


def check_cache(run: RunConfig, cache: Cache, objective: Objective, vocab_size: int) -> None:
    """Check that a cache is one of this job's data, and has what its loss needs.

    Raises:
        ConfigError: It is not, or it has not.
    """
    args = run.args
    if args.mock_data:
        raise ConfigError("a cache does not go with --mock-data")
    data = {"sequence_length": args.seq_length, "vocabulary": vocab_size, "reset_at_documents": _resets(args)}
    if None not in (args.tokenizer_fingerprint, cache.manifest.tokenizer):
        data["tokenizer"] = args.tokenizer_fingerprint
    cache.check(objective, **data)


@dataclass(frozen=True)
class Writing:
    """A cache that is to be written.

    Attributes:
        directory: Where.
        manifest: What is stored.
        teacher: The teacher.
        known: Identities of the samples that are stored already.
    """

    directory: Path
    manifest: Manifest
    teacher: Teacher
    known: set[bytes]


def check_writing(run: RunConfig, vocab_size: int) -> Writing:
    """Find what is wrong with a command line that writes a cache, before any process group.

    Args:
        run: The validated command line, as `command_line` left it.
        vocab_size: Entries of the tokenizer, without padding.

    Raises:
        ConfigError: An option is illegal, the model is not the teacher's, or the directory holds something else.
        CheckpointError: There is no usable checkpoint of the teacher.
        DataError: What the directory holds already is damaged.
    """
    args, given = run.args, run.options["distill"]
    check_writable(Path(given.cache_write), "--distill-cache-write")
    teacher, directory = Teacher.find(given.teacher), Path(given.cache_write)
    wanted = replace(compared(given, teacher), divergence="top-k-rest")
    wanted.check(vocab_size)
    length = run.architecture.max_position_embeddings  # a teacher without positions reads any
    if run.architecture != replace(teacher.architecture, max_position_embeddings=length):
        raise ConfigError(
            "the command line describes another model than the teacher",
            got=f"{run.architecture}", legal=f"none of the model's flags, which give {teacher.architecture}",
        )  # fmt: skip
    data = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")
    if args.mock_data or all(getattr(args, name) is None for name in data):
        raise ConfigError("a cache is written for data", legal="--data-path or --train-data-path")
    teacher.check(
        run.architecture,
        vocab_size=vocab_size,
        student_multiple=args.make_vocab_size_divisible_by * args.tensor_model_parallel_size,
        tp=args.tensor_model_parallel_size,
        stages=args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1),
        ep=args.expert_model_parallel_size,
        tokenizer_model=tokenizer.given(args),
    )
    manifest = Manifest(
        k=wanted.k,
        dtype=given.cache_dtype,
        temperature=wanted.temperature,
        sequence_length=args.seq_length,
        vocabulary=vocab_size,
        teacher=layout.fingerprint(teacher.step),
        precision=str(args.params_dtype).removeprefix("torch."),
        reset_at_documents=_resets(args),
        seed=args.seed,
        tokenizer=args.tokenizer_fingerprint,
        provenance={
            "teacher": str(teacher.step.absolute()),
            "architecture": teacher.architecture.to_dict(),
            "versions": versions(),
            "commit": git_commit(),
        },
    )
    manifest = begin(directory, manifest)
    return Writing(directory, manifest, teacher, CacheReader(directory, manifest).known())


def _resets(args: Any) -> list[bool]:
    return [args.reset_position_ids, args.reset_attention_mask]
