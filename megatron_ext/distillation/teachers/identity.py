"""Whom a run learns from, kept in its checkpoints: a teacher's directory may gain a step between two starts of the run.

The run's arguments, which Megatron puts into every checkpoint, have it as `distill_source`.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.ranks import gather
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.training.job import RunConfig

CORRECTED = "teacher"  # in the run directory


@runtime_checkable
class OnDisk(Protocol):
    """A teacher of any family."""

    @property
    def step(self) -> Path:
        """The step that its weights are read from."""
        ...


def identity(source: OnDisk | Cache) -> dict[str, str]:
    """The flag that names this very source, the fingerprint of the teacher's step, and of a cache its settings'."""
    if isinstance(source, Cache):
        cache = {"teacher": source.manifest.teacher, "cache": source.manifest.settings}
        return {"flag": f"--distill-cache {source.path.absolute()}", **cache}
    return {"flag": f"--distill-teacher {source.step.absolute()}", "teacher": layout.fingerprint(source.step)}


def remember(run: RunConfig, source: OnDisk | Cache) -> None:
    """Note whom the run learns from, once it is sure that it has not learned from another before.

    Raises:
        CheckpointError: It has, or the teacher that was corrected for it was another.
    """
    now = identity(source)
    for step in _before(run):
        args = layout.common(step).get("args")
        before = getattr(args, "distill_source", None) if isinstance(args, Namespace) else None
        if before is None or all(
            now[key] == before[key] for key in ("teacher", "cache") if key in now and key in before
        ):
            continue
        raise CheckpointError(
            "a run cannot go on with another teacher", got=f"{now['flag']}; {step} was trained with {before['flag']}",
            legal=f"{before['flag']}, if it is still there; --pretrained-checkpoint starts a new run from its weights",
        )  # fmt: skip
    run.args.distill_source = now


def check_alike(source: OnDisk | Cache) -> None:
    """Check that all ranks have found the same. A collective.

    Raises:
        CheckpointError: They have not.
    """
    found = gather(identity(source))
    if len({each["teacher"] for each in found}) > 1:
        raise CheckpointError(
            "the ranks have found different steps of the teacher, which has gained one just now",
            got=", ".join(sorted({each["flag"] for each in found})), legal="one of them",
        )  # fmt: skip


def _before(run: RunConfig) -> Iterator[Path]:
    """The step that the run goes on from, and that of the teacher which it has corrected."""
    if run.resumed and run.start is not None:
        yield run.start.step.path
    if getattr(run.options["distill"], "correct_teacher", None) and has_checkpoint(
        folder := Path(run.args.save) / CORRECTED
    ):
        try:
            yield layout.newest(folder).path
        except UntrustedError:
            raise
        except CheckpointError:
            return  # a save that was cut off before the student's first; whoever needs that teacher says so
