"""Applying a plan: a table of moves from checkpoint to checkpoint, at the speed of the disk."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_ext.checkpoint import layout, stream
from megatron_ext.checkpoint.atomic import refuse_existing
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.stream import Move, Part, Progress, silent
from megatron_ext.checkpoint.writer import check_tensors, writing
from megatron_ext.pruning.saved_plan import SavedPlan
from megatron_ext.pruning.weights import check_weights

PLAN_FILE = "plan.json"


def apply(
    plan: SavedPlan,
    source: str | Path,
    destination: str | Path,
    attachments: Mapping[str, Callable[[Path], object]] | None = None,
    progress: Progress = silent,
) -> Path:
    """Cut the checkpoint at `source` as `plan` says, into a new one at `destination`.

    Any layout may have saved the one and may load the other. Only weights are carried over, in the type they were
    saved in, and what a converted checkpoint keeps of its origin (configuration, tokenizer): the result starts from
    iteration 0 with a fresh optimizer. Kept values are copied bit for bit. The plan is stored beside them. If anything
    goes wrong, nothing is left at `destination`. In a process group all processes call this, and each writes its
    share of the tensors.

    Args:
        plan: The plan.
        source: A checkpoint directory (then its newest complete step), or a step in it.
        destination: A new directory.
        attachments: Further files of the destination, by name, with what writes them; those of the first process.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The destination.

    Raises:
        CheckpointError: The source is missing or damaged, or the destination exists.
        PlanError: The plan belongs to another model, or to other weights of this one.
    """
    destination = Path(destination)
    refuse_existing(destination)
    reader = CheckpointReader(source)
    plan.check(plan.model_of(reader.step.path))
    schema = plan.schema(reader.entries)
    check_tensors(schema.tensors(plan.source), reader.shapes)
    check_weights("a plan", plan.provenance.fingerprint, plan.provenance.iteration, reader.step.path)
    args = layout.common(reader.step.path).get("args")
    added = stream.WithTensors(reader, plan.added(reader.entries))
    with writing(destination, plan.target, args if isinstance(args, Namespace) else None, schema) as writer:
        stream.run(compile_moves(plan, added.entries), added, writer, progress)
        for name, save in {PLAN_FILE: plan.save, **plan.attachments(), **(attachments or {})}.items():
            writer.attach(name, save)
        hf_assets.hand_on(reader.step.path, writer)
    return destination


def compile_moves(plan: SavedPlan, entries: Mapping[str, TensorEntry]) -> list[Move]:
    """One move for each weight of the smaller model, in the order of the forward pass, of its shape there.

    Args:
        plan: The plan.
        entries: The tensors of the original.
    """
    moves: list[Move] = []
    for key, shape in plan.schema(entries).tensors(plan.target).items():
        old = plan.origin(key)
        entry = TensorEntry(shape, entries[old.key].dtype)
        moves.append(Move(key, entry, (Part(old.key),), function=old.function, gather=old.gather))
    return moves
