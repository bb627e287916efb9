"""Where a run goes on: the newest step that verifies, found before any process group forms, never by chance."""

import os
import warnings
from pathlib import Path

import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.models.config import Architecture

TRACKER = "latest_checkpointed_iteration.txt"


def steps_on_disk(directory: Path) -> list[int]:
    """Iterations that `directory` has a folder for, ascending; complete or not."""
    return sorted(int(p.name[5:]) for p in directory.glob("iter_*") if p.is_dir() and p.name[5:].isdigit())


def has_checkpoint(directory: Path) -> bool:
    """Whether anything in `directory` claims to be a Megatron checkpoint."""
    return (directory / TRACKER).is_file() or bool(steps_on_disk(directory))


def architecture_on_disk(directory: Path) -> Architecture:
    common = torch.load(directory / f"iter_{steps_on_disk(directory)[-1]:07d}" / "common.pt", weights_only=False)
    return Architecture.from_args(common["args"])
