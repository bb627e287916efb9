"""Applying a plan: a stream from checkpoint to checkpoint, tensor by tensor, at the speed of the disk."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_ext.checkpoint import layout, ranks
from megatron_ext.checkpoint.atomic import refuse_existing
from megatron_ext.checkpoint.huggingface import companions
from megatron_ext.checkpoint.reader import Reader
from megatron_ext.checkpoint.scratch import Scratch
from megatron_ext.checkpoint.writer import Writer, check_shapes, writing
from megatron_ext.models import axes
from megatron_ext.pruning.merge import merge_heads
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.weights import check_weights

PLAN_FILE = "plan.json"


def apply(
    plan: Plan,
    source: str | Path,
    destination: str | Path,
    attachments: Mapping[str, Callable[[Path], object]] | None = None,
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

    Returns:
        The destination.

    Raises:
        CheckpointError: The source is missing or damaged, or the destination exists.
        PlanError: The plan belongs to another model, or to other weights of this one.
    """
    destination = Path(destination)
    refuse_existing(destination)
    reader = Reader(source)
    plan.check(layout.architecture(reader.step.path))
    check_shapes(plan.source, reader.shapes)
    check_weights("a plan", plan.provenance.fingerprint, plan.provenance.iteration, reader.step.path)
    args = layout.common(reader.step.path).get("args")
    with writing(destination, plan.target, args if isinstance(args, Namespace) else None) as writer:
        rest = [key for key in own_share(plan) if not _copied(plan, reader, key, writer)]
        for key, tensor in cut(plan, reader, rest, reuse=True):
            writer.write(key, tensor)
        if ranks.rank() == 0:
            for name, save in {PLAN_FILE: plan.save, **(attachments or {})}.items():
                writer.attach(name, save)
            companions.hand_on(reader.step.path, writer)
    return destination


def own_share(plan: Plan) -> list[str]:
    """The weights of the smaller model that this process writes."""
    keys = axes.tensors(plan.target)
    owners = ranks.shares([prod(shape) for shape in keys.values()])
    return [key for key, owner in zip(keys, owners, strict=True) if owner == ranks.rank()]


def cut(
    plan: Plan, reader: Reader, keys: Sequence[str] | None = None, *, reuse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the smaller model, one after the other, in the order of the forward pass.

    Args:
        plan: The plan.
        reader: The original.
        keys: Weights of the smaller model; all of them by default.
        reuse: Whether each tensor may take the place of the one before.

    Yields:
        The key in the smaller model, and the tensor, of the shape that `axes.shape(plan.target, key)` says.
    """
    old, new = (Scratch(), Scratch()) if reuse else (None, None)
    for key in axes.keys(plan.target) if keys is None else keys:
        old_layer, old_key, weight = _original(plan, key)
        tensor = reader.read(old_key) if old is None else reader.read(old_key, old)
        if weight.axes[0] == "qkv" and old_layer is not None and (pairs := plan.merged_heads.get(old_layer)):
            tensor = merge_heads(plan.source, tensor, pairs)
        here, free = old, new  # two dimensions are cut from the one to the other and back
        for dimension, index in enumerate(axes.indices(plan.source, old_key, plan.kept(old_layer))):
            if index is not None:
                shape = axes.taken_shape(tensor, dimension, index)
                tensor = axes.take(tensor, dimension, index, None if free is None else free.tensor(shape, tensor.dtype))
                here, free = free, here
        yield key, tensor


def _original(plan: Plan, key: str) -> tuple[int | None, str, axes.Weight]:
    """The layer and the key, in the original, of a weight of the smaller model; and what it is."""
    layer, weight = axes.locate(plan.target, key)
    old_layer = None if layer is None else plan.units[layer]
    return old_layer, key if old_layer is None else f"{axes.LAYER}.{old_layer}.{weight.name}", weight


def _copied(plan: Plan, reader: Reader, key: str, writer: Writer) -> bool:
    """Whether nothing of a weight is cut, and it could be copied as it lies on disk."""
    layer, old_key, weight = _original(plan, key)
    merged = weight.axes[0] == "qkv" and layer in plan.merged_heads
    cut = any(index is not None for index in axes.indices(plan.source, old_key, plan.kept(layer)))
    return not merged and not cut and reader.copy(old_key, writer, key)
