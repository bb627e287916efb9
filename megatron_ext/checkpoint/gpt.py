"""Checkpoints of Megatron's GPTModel into the pattern form, and back, tensor by tensor.

A GPTModel has layers of two sub-layers, `*-` or `*E`. Where all its layers are alike, it keeps each weight of theirs as
one tensor whose first dimension is the layers (`megatron/core/transformer/transformer_block.py`, `sharded_state_dict`).
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout, stream
from megatron_ext.checkpoint.atomic import refuse_existing
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.stream import Move, Part, Progress, silent
from megatron_ext.checkpoint.writer import CheckpointSchema, check_shapes, check_tensors, writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MLP, MOE

_FINAL_NORM, _GPT_FINAL_NORM = "decoder.final_norm.", "decoder.final_layernorm."
# Megatron's own modules (`--transformer-impl local`) call the norm before experts as that before an MLP.
_LOCAL_NORM = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
ROPE_FACTOR = 8.0  # `gpt_config_from_args` hands on no other


def architecture(step: str | Path) -> Architecture:
    """The model that a GPTModel's step holds, as a layer pattern.

    Raises:
        CheckpointError: It has no arguments, is no GPTModel's, or its function is none of ours; names the argument.
    """
    args = layout.common(step).get("args")
    if not isinstance(args, Namespace) or not getattr(args, "num_layers", None):
        raise CheckpointError("the checkpoint does not say which model it holds", got=step)
    if layout.pattern_of(args):
        raise CheckpointError(
            "the checkpoint is in the pattern form already", got=layout.pattern_of(args), legal="--from megatron"
        )
    values = dict(vars(args))
    values.setdefault("layernorm_zero_centered_gamma", values.get("apply_layernorm_1p", False))
    values["hybrid_layer_pattern"] = "".join(f"{ATTENTION}{unit}" for unit in _feed_forwards(args))
    try:
        return Architecture.from_args(Namespace(**values))
    except AttributeError as error:
        raise CheckpointError(f"the checkpoint does not say which model it holds: {error}", got=step) from error


def _feed_forwards(args: Namespace) -> str:
    """The second sub-layer of each layer."""
    if not getattr(args, "num_experts", None):
        return MLP * args.num_layers
    every = getattr(args, "moe_layer_freq", 1)
    chosen = [layer % every == 0 for layer in range(args.num_layers)] if isinstance(every, int) else every
    return "".join(MOE if each else MLP for each in chosen)


def is_uniform(arch: Architecture) -> bool:
    """Whether all layers of a GPTModel are alike, so that it stacks them."""
    return len(set(arch.pattern[1::2])) == 1


def check(arch: Architecture) -> None:
    """Check that a GPTModel can be this model.

    Raises:
        CheckpointError: Its pattern or RoPE scaling is another, or its sizes differ from layer to layer.
    """
    if set(arch.pattern[::2]) != {ATTENTION} or not set(arch.pattern[1::2]) <= {MLP, MOE} or len(arch.pattern) % 2:
        raise CheckpointError(
            "a GPTModel cannot have this layer pattern", got=arch.pattern, legal="*- and *E, one after another"
        )
    if arch.layer_sizes:
        raise CheckpointError("a GPTModel's sizes cannot differ from layer to layer", got=arch.layer_sizes)
    if own := [word for word in arch.to_flags() if word.startswith("--ext-")]:
        raise CheckpointError("a GPTModel cannot be what Megatron has no flags for", got=" ".join(own))
    if arch.rope_scaling_factor not in (None, ROPE_FACTOR):
        raise CheckpointError(
            "Megatron builds a GPTModel with its default RoPE scaling, whatever --rope-scaling-factor says",
            got=arch.rope_scaling_factor, legal=ROPE_FACTOR,
        )  # fmt: skip


def place(arch: Architecture, key: str, stacked: bool) -> tuple[str, int | None]:
    """Where a GPTModel keeps a weight of ours: its key, and the layer in its first dimension if layers are stacked."""
    layer, weight = axes.locate(arch, key)
    if layer is None:
        return key.replace(_FINAL_NORM, _GPT_FINAL_NORM), None
    if stacked:
        return f"{axes.LAYER}.{weight.name}", layer // 2
    return f"{axes.LAYER}.{layer // 2}.{weight.name}", None


def tensors(arch: Architecture, stacked: bool | None = None) -> dict[str, tuple[int, ...]]:
    """Every weight of a GPTModel and its global shape; stacked where all layers are alike, by default."""
    check(arch)
    stacked = is_uniform(arch) if stacked is None else stacked
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in axes.tensors(arch).items():
        gpt_key, layer = place(arch, key, stacked)
        shapes[gpt_key] = shape if layer is None else (len(arch.pattern) // 2, *shape)
    return shapes


def _states(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Modules that a GPTModel asks for an `_extra_state`, and the grid of such objects that each has."""
    states: dict[str, tuple[int, ...]] = {}
    layers = len(arch.pattern) // 2
    for module, count in axes.modules_with_state(arch).items():
        if not module.startswith(axes.LAYER):
            states[module.replace(_FINAL_NORM[:-1], _GPT_FINAL_NORM[:-1])] = (count,)
            continue
        layer, name = module.removeprefix(f"{axes.LAYER}.").split(".", 1)
        if is_uniform(arch):
            states[f"{axes.LAYER}.{name}"] = (layers, count) if ".experts.experts." in name else (layers,)
        else:
            states[f"{axes.LAYER}.{int(layer) // 2}.{name}"] = (count,)
    del states["output_layer"]  # it asks for none
    return states


def to_args(arch: Architecture) -> dict[str, Any]:
    """Megatron's arguments of a GPTModel, of Transformer Engine's modules, after which `tensors` are named."""
    experts = [int(unit == MOE) for unit in arch.pattern[1::2]]
    return arch.to_args() | {
        "hybrid_layer_pattern": None, "hybrid_override_pattern": None, "is_hybrid_model": False, "spec": None,
        "num_layers": len(experts), "moe_layer_freq": 1 if is_uniform(arch) else experts,
        "transformer_impl": "transformer_engine",
    }  # fmt: skip


GPT = CheckpointSchema(tensors, _states, to_args)


def to_pattern(source: str | Path, destination: str | Path, progress: Progress = silent) -> Architecture:
    """Convert a checkpoint of a GPTModel, saved on any layout, into one of a `HybridModel` for any layout.

    Args:
        source: A checkpoint directory (then its newest complete step), or a step in it; its optimizer state is left.
        destination: A new directory.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The model.

    Raises:
        CheckpointError: The source is missing, damaged or of a kind that is not converted, or the destination exists.
    """
    refuse_existing(Path(destination))
    reader = CheckpointReader(source)
    arch = architecture(reader.step.path)
    stacked = _check_gpt(arch, reader)
    args = layout.common(reader.step.path)["args"]
    moves: list[Move] = []
    for key, shape in axes.tensors(arch).items():
        gpt_key, layer = place(arch, key, stacked)
        gpt_key = _alias(gpt_key, reader)
        part = Part(gpt_key, None if layer is None else (layer, layer + 1))
        moves.append(Move(key, TensorEntry(shape, reader.entries[gpt_key].dtype), (part,)))
    with writing(destination, arch, args) as writer:
        stream.run(moves, reader, writer, progress)
        hf_assets.hand_on(reader.step.path, writer)
    return arch


def to_gpt(source: str | Path, destination: str | Path, progress: Progress = silent) -> Architecture:
    """Convert a checkpoint of a `HybridModel` into one that Megatron's `pretrain_gpt.py` loads, on any layout.

    Args:
        source: A checkpoint directory (then its newest complete step), or a step in it.
        destination: A new directory.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The model.

    Raises:
        CheckpointError: The source is missing or damaged, no GPTModel can be it, or the destination exists.
    """
    refuse_existing(Path(destination))
    reader = CheckpointReader(source)
    arch = layout.architecture(reader.step.path)
    check(arch)
    check_shapes(arch, reader.shapes)
    args = layout.common(reader.step.path)["args"]
    moves: list[Move] = []
    for key in axes.tensors(arch):
        gpt_key, layer = place(arch, key, is_uniform(arch))
        stacked = None if layer is None else (layer, len(arch.pattern) // 2)
        moves.append(Move(gpt_key, reader.entries[key], (Part(key),), layer=stacked))
    with writing(destination, arch, args, GPT) as writer:
        stream.run(moves, reader, writer, progress)
        hf_assets.hand_on(reader.step.path, writer)
    return arch


def _alias(gpt_key: str, reader: CheckpointReader) -> str:
    return gpt_key if gpt_key in reader.shapes else gpt_key.replace(*_LOCAL_NORM)


def _check_gpt(arch: Architecture, reader: CheckpointReader) -> bool:
    """Check that a checkpoint holds exactly the tensors of a GPTModel; whether its layers are stacked.

    Raises:
        CheckpointError: Names the first few that are missing, too many, or of another shape.
    """
    first, _ = place(arch, next(key for key in axes.tensors(arch) if key.startswith(axes.LAYER)), True)
    stacked = first in reader.shapes
    if stacked and not is_uniform(arch):
        raise CheckpointError("the checkpoint is damaged: layers that differ are one tensor", got=first)
    expected = tensors(arch, stacked)
    check_tensors({_alias(key, reader): shape for key, shape in expected.items()}, reader.shapes)
    return stacked
