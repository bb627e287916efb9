"""A checkpoint, opened to be run and not trained, on whatever layout the flags say."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.errors import ConfigError
from megatron_ext.inference.options import TYPES
from megatron_ext.models import axes
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import FORWARD_ONLY, Job, RunConfig

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

NO_DATA = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1")
JOB = Job("evaluate", defaults=(*FORWARD_ONLY, *NO_DATA))


def prepare(checkpoint: Path, dtype: str | None, flags: Sequence[str]) -> RunConfig:
    """Validate everything about a checkpoint and a layout, before anything is started.

    Args:
        checkpoint: A checkpoint directory, or a step in one.
        dtype: One of `TYPES`; by default that of the embedding.
        flags: Megatron's.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: The model does not fit the layout, or a flag is wrong.
    """
    for word in flags:
        if word.split("=")[0] in ("--load", "--save", "--pretrained-checkpoint"):
            raise ConfigError("the checkpoint is named without a flag, and nothing is trained", got=word)
    step = layout.find(checkpoint)
    arch = layout.architecture(step.path)
    stored = str(layout.tensors(step.path)[axes.EMBEDDING][1]).removeprefix("torch.")
    # Every pass says its own length; this one only has to divide by whatever the layout wants.
    length = 2 ** (arch.max_position_embeddings.bit_length() - 1)
    words = ["--load", str(step.path.parent), "--seq-length", str(length), *TYPES[dtype or stored], *flags]
    if not step.is_release:
        words += ["--ckpt-step", str(step.iteration)]
    return parse_command_line(JOB, words)


@contextmanager
def open_checkpoint(started: RunConfig, vocab_size: int) -> "Iterator[ShardedModel]":
    """Start Megatron and load the model; ends the process group afterwards.

    Args:
        started: From `prepare`.
        vocab_size: See `ShardedModel`.
    """
    from megatron.core.utils import unwrap_model

    from megatron_ext.inference.sharded import ShardedModel
    from megatron_ext.training.forward import load_model

    # Standard output, to which Megatron's log goes, belongs to what is generated or measured.
    disabled = logging.root.manager.disable
    if not os.environ.get("MEGATRON_EXT_VERBOSE"):
        logging.disable(logging.WARNING)
    try:
        chunks = load_model(started)
        yield ShardedModel(unwrap_model(chunks), started.architecture, vocab_size)
    finally:
        logging.disable(disabled)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
