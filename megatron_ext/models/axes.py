"""The axes table: which dimension of which weight lies on which axis of the model.

A Megatron `torch_dist` checkpoint of a `HybridModel` is a set of global tensors, one key per weight of each sub-layer,
whatever parallel layout saved it. This table names the axis of every dimension. Counting parameters, slicing a
checkpoint, masking an elastic model and planning memory all read it.

The keys are those of the stock `hybrid_stack_spec`, whose pre-norms are fused into the linear layer that follows
(`megatron/core/models/hybrid/hybrid_block.py`, `ssm/mamba_mixer.py`, `transformer/attention.py`, `transformer/mlp.py`),
but for a mixture of experts, whose pre-norm stands alone and whose experts are one tensor
(`transformer/moe/experts.py`), and for a linear sub-layer, which is ours (`linear_sublayer.py`).

To count needs no torch, which takes a second to import; only `indices` does.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import CheckpointError
from megatron_ext.models.dimensions import Dimensions
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE

if TYPE_CHECKING:
    from torch import Tensor

Positions = NDArray[np.int64]

CONV_KERNEL = 4
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LAYER = "decoder.layers"
POST_NORM = "post_norm"
"""The module of a layer that norms what it adds (`specs.py`)."""


@dataclass(frozen=True)
class KeptIndices:
    """What is kept of one sub-layer: ascending indices on each prunable axis, `None` for all of it.

    What lies in groups is numbered over all groups of the original, and every group that stays keeps the same number.

    Attributes:
        hidden: Channels of the residual stream; the same for every sub-layer of a model.
        ffn: Neurons of the MLP.
        kv_groups: Key/value groups, each a key head, a value head and its query heads.
        query_heads: Query heads, of the groups that stay.
        mamba_groups: SSM groups, each its heads and its part of B and C.
        mamba_heads: Mamba-2 heads, of the groups that stay.
        head_channels: Channels inside a Mamba-2 head, the same for every head.
        states: State channels (rows of B and of C), of the groups that stay.
        experts: Experts of a mixture.
        expert_ffn: Neurons of the experts that stay: each keeps as many, but its own; neuron n of expert e of F neurons
            is number e * F + n.
        shared_ffn: Neurons of the shared expert.
    """

    hidden: Sequence[int] | None = None
    ffn: Sequence[int] | None = None
    kv_groups: Sequence[int] | None = None
    query_heads: Sequence[int] | None = None
    mamba_groups: Sequence[int] | None = None
    mamba_heads: Sequence[int] | None = None
    head_channels: Sequence[int] | None = None
    states: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    expert_ffn: Sequence[int] | None = None
    shared_ffn: Sequence[int] | None = None


@dataclass(frozen=True)
class Axis:
    """One axis: its length, the positions that `KeptIndices` leave (`None`: all), and the parallelism that splits it.

    Positions are `(kept,)`, or `(kept experts, kept)` where each expert, dimension 0 of its weight, keeps its own.
    """

    size: Callable[[Dimensions], int]
    index: Callable[[Dimensions, KeptIndices], Positions | None] = lambda arch, kept: None
    split: Literal["tp", "ep", "etp"] | None = "tp"


@dataclass(frozen=True)
class Weight:
    """One weight: the sub-layer that has it (`""`: the model), its key within it, its axes, and when it exists."""

    unit: str
    name: str
    axes: tuple[str, ...]
    exists: Callable[[Dimensions], bool] = lambda arch: True


def _indices(kept: Sequence[int] | None) -> Positions | None:
    return None if kept is None else np.array(kept, np.int64)


def _outer(
    rows: Sequence[int] | None, num_rows: int, columns: Sequence[int] | None, num_columns: int
) -> Positions | None:
    """Flat positions of the kept rows x kept columns of a `(num_rows, num_columns)` grid."""
    if rows is None and columns is None:
        return None
    r = np.arange(num_rows) if rows is None else np.array(rows, np.int64)
    c = np.arange(num_columns) if columns is None else np.array(columns, np.int64)
    return (r[:, None] * num_columns + c).flatten()


def _members(
    groups: Sequence[int] | None, num_groups: int, members: Sequence[int] | None, num_members: int
) -> Sequence[int] | None:
    """What stays of members that lie in groups: those named, or else all members of the groups that stay."""
    if members is not None or groups is None:
        return members
    per_group = num_members // num_groups
    return [group * per_group + i for group in groups for i in range(per_group)]


def _query_heads(arch: Dimensions, kept: KeptIndices) -> Sequence[int] | None:
    return _members(kept.kv_groups, arch.num_query_groups, kept.query_heads, arch.num_attention_heads)


def _mamba_heads(arch: Dimensions, kept: KeptIndices) -> Sequence[int] | None:
    return _members(kept.mamba_groups, arch.mamba_num_groups, kept.mamba_heads, arch.mamba_num_heads)


def _states(arch: Dimensions, kept: KeptIndices) -> Sequence[int] | None:
    total = arch.mamba_num_groups * arch.mamba_state_dim
    return _members(kept.mamba_groups, arch.mamba_num_groups, kept.states, total)


def _halves(arch: Dimensions) -> int:
    return 2 if arch.gated_linear_unit else 1


# [gate; up] stacked: apply_swiglu_sharded_factory gives each half its own global offset, whatever TP is
def _gate_and_up(arch: Dimensions, kept: Sequence[int] | None, size: int) -> Positions | None:
    return _outer(None, _halves(arch), kept, size)


def _expert_neurons(arch: Dimensions, kept: KeptIndices) -> Positions | None:
    if kept.expert_ffn is None:
        return None
    experts = arch.num_experts if kept.experts is None else len(kept.experts)
    return np.array(kept.expert_ffn, np.int64).reshape(experts, -1) % arch.moe_ffn_hidden_size


def _expert_gate_and_up(arch: Dimensions, kept: KeptIndices) -> Positions | None:
    neurons = _expert_neurons(arch, kept)
    if neurons is None:
        return None
    return np.concatenate([neurons + half * arch.moe_ffn_hidden_size for half in range(_halves(arch))], axis=1)


def _qkv(arch: Dimensions, kept: KeptIndices) -> Positions | None:
    # per kv group: its query heads, then its key head, then its value head
    query_heads = _query_heads(arch, kept)
    if query_heads is None:
        return None
    per_group = arch.num_attention_heads // arch.num_query_groups
    heads = []
    for group in range(arch.num_query_groups) if kept.kv_groups is None else kept.kv_groups:
        first = group * (per_group + 2)
        heads += [first + head % per_group for head in query_heads if head // per_group == group]
        heads += [first + per_group, first + per_group + 1]
    return _outer(heads, len(heads), None, arch.kv_channels)


AXES: dict[str, Axis] = {
    "hidden": Axis(lambda a: a.hidden_size, lambda a, k: _indices(k.hidden), split=None),
    "vocab": Axis(lambda a: a.padded_vocab_size),
    "ffn": Axis(lambda a: a.ffn_hidden_size, lambda a, k: _indices(k.ffn)),
    "gate+up": Axis(lambda a: a.ffn_hidden_size * _halves(a), lambda a, k: _gate_and_up(a, k.ffn, a.ffn_hidden_size)),
    "qkv": Axis(lambda a: (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels, _qkv),
    "channel": Axis(lambda a: a.kv_channels, split=None),
    "key_head*channel": Axis(
        lambda a: a.num_query_groups * a.kv_channels,
        lambda a, k: _outer(k.kv_groups, a.num_query_groups, None, a.kv_channels),
    ),
    "query_head*channel": Axis(
        lambda a: a.num_attention_heads * a.kv_channels,
        lambda a, k: _outer(_query_heads(a, k), a.num_attention_heads, None, a.kv_channels),
    ),
    "mamba_head": Axis(lambda a: a.mamba_num_heads, lambda a, k: _indices(_mamba_heads(a, k))),
    "mamba_head*channel": Axis(
        lambda a: a.mamba_num_heads * a.mamba_head_dim,
        lambda a, k: _outer(_mamba_heads(a, k), a.mamba_num_heads, k.head_channels, a.mamba_head_dim),
    ),
    "mamba_group*state": Axis(lambda a: a.mamba_num_groups * a.mamba_state_dim, lambda a, k: _indices(_states(a, k))),
    "expert": Axis(lambda a: a.num_experts, lambda a, k: _indices(k.experts), split="ep"),
    "routed": Axis(lambda a: a.num_experts, lambda a, k: _indices(k.experts), split=None),
    "expert_ffn": Axis(lambda a: a.moe_ffn_hidden_size, _expert_neurons, split="etp"),
    "expert_gate+up": Axis(lambda a: a.moe_ffn_hidden_size * _halves(a), _expert_gate_and_up, split="etp"),
    "shared_ffn": Axis(lambda a: a.moe_shared_expert_intermediate_size, lambda a, k: _indices(k.shared_ffn)),
    "shared_gate+up": Axis(
        lambda a: a.moe_shared_expert_intermediate_size * _halves(a),
        lambda a, k: _gate_and_up(a, k.shared_ffn, a.moe_shared_expert_intermediate_size),
    ),
    "rank": Axis(lambda a: a.linear_rank, split=None),
    "one": Axis(lambda a: 1, split=None),
    "conv": Axis(lambda a: CONV_KERNEL, split=None),
}


def _has_norm_bias(arch: Dimensions) -> bool:
    return arch.normalization == "LayerNorm"


def _has_bias(arch: Dimensions) -> bool:
    return arch.add_bias_linear


def _has_shared_expert(arch: Dimensions) -> bool:
    return arch.moe_shared_expert_intermediate_size > 0


def _norm(unit: str, name: str, exists: Callable[[Dimensions], bool] = lambda arch: True) -> list[Weight]:
    return [
        Weight(unit, f"{name}weight", ("hidden",), exists),
        Weight(unit, f"{name}bias", ("hidden",), lambda a: exists(a) and _has_norm_bias(a)),
    ]


def _pre_norm(unit: str, name: str) -> list[Weight]:
    return _norm(unit, name, lambda a: a.pre_norm)


def _post_norm(unit: str) -> list[Weight]:
    return _norm(unit, f"{POST_NORM}.", lambda a: a.post_norm)


def _qk_norm(name: str) -> list[Weight]:
    name = f"self_attention.{name}_layernorm."
    return [
        Weight(ATTENTION, f"{name}weight", ("channel",), lambda a: a.qk_layernorm),
        Weight(ATTENTION, f"{name}bias", ("channel",), lambda a: a.qk_layernorm and _has_norm_bias(a)),
    ]


TABLE: list[Weight] = [
    Weight("", EMBEDDING, ("vocab", "hidden")),
    *_pre_norm(MAMBA, "mixer.in_proj.layer_norm_"),
    Weight(MAMBA, "mixer.in_proj.weight.z", ("mamba_head*channel", "hidden")),
    Weight(MAMBA, "mixer.in_proj.weight.x", ("mamba_head*channel", "hidden")),
    Weight(MAMBA, "mixer.in_proj.weight.B", ("mamba_group*state", "hidden")),
    Weight(MAMBA, "mixer.in_proj.weight.C", ("mamba_group*state", "hidden")),
    Weight(MAMBA, "mixer.in_proj.weight.dt", ("mamba_head", "hidden")),
    Weight(MAMBA, "mixer.conv1d.weight.x", ("mamba_head*channel", "one", "conv")),
    Weight(MAMBA, "mixer.conv1d.weight.B", ("mamba_group*state", "one", "conv")),
    Weight(MAMBA, "mixer.conv1d.weight.C", ("mamba_group*state", "one", "conv")),
    Weight(MAMBA, "mixer.conv1d.bias.x", ("mamba_head*channel",)),
    Weight(MAMBA, "mixer.conv1d.bias.B", ("mamba_group*state",)),
    Weight(MAMBA, "mixer.conv1d.bias.C", ("mamba_group*state",)),
    Weight(MAMBA, "mixer.dt_bias", ("mamba_head",)),
    Weight(MAMBA, "mixer.A_log", ("mamba_head",)),
    Weight(MAMBA, "mixer.D", ("mamba_head",)),
    Weight(MAMBA, "mixer.norm.weight", ("mamba_head*channel",)),
    Weight(MAMBA, "mixer.out_proj.weight", ("hidden", "mamba_head*channel")),
    *_post_norm(MAMBA),
    *_pre_norm(ATTENTION, "self_attention.linear_qkv.layer_norm_"),
    Weight(ATTENTION, "self_attention.linear_qkv.weight", ("qkv", "hidden")),
    Weight(ATTENTION, "self_attention.linear_qkv.bias", ("qkv",), lambda a: a.add_qkv_bias),
    Weight(
        ATTENTION,
        "self_attention.q_layernorm.heads_weight",
        ("query_head*channel",),
        lambda a: a.qk_layernorm_of_all_heads,
    ),
    Weight(
        ATTENTION,
        "self_attention.k_layernorm.heads_weight",
        ("key_head*channel",),
        lambda a: a.qk_layernorm_of_all_heads,
    ),
    *_qk_norm("q"),
    *_qk_norm("k"),
    Weight(ATTENTION, "self_attention.linear_proj.weight", ("hidden", "query_head*channel")),
    Weight(ATTENTION, "self_attention.linear_proj.bias", ("hidden",), _has_bias),
    *_post_norm(ATTENTION),
    *_pre_norm(MLP, "mlp.linear_fc1.layer_norm_"),
    Weight(MLP, "mlp.linear_fc1.weight", ("gate+up", "hidden")),
    Weight(MLP, "mlp.linear_fc1.bias", ("gate+up",), _has_bias),
    Weight(MLP, "mlp.linear_fc2.weight", ("hidden", "ffn")),
    Weight(MLP, "mlp.linear_fc2.bias", ("hidden",), _has_bias),
    *_post_norm(MLP),
    *_pre_norm(MOE, "pre_mlp_layernorm."),
    Weight(MOE, "mlp.router.weight", ("routed", "hidden")),
    Weight(MOE, "mlp.router.bias", ("routed",), _has_bias),
    Weight(MOE, "mlp.router.expert_bias", ("routed",), lambda a: a.moe_router_enable_expert_bias),
    Weight(MOE, "mlp.experts.experts.linear_fc1.weight", ("expert", "expert_gate+up", "hidden")),
    Weight(MOE, "mlp.experts.experts.linear_fc1.bias", ("expert", "expert_gate+up"), _has_bias),
    Weight(MOE, "mlp.experts.experts.linear_fc2.weight", ("expert", "hidden", "expert_ffn")),
    Weight(MOE, "mlp.experts.experts.linear_fc2.bias", ("expert", "hidden"), _has_bias),
    Weight(MOE, "mlp.shared_experts.linear_fc1.weight", ("shared_gate+up", "hidden"), _has_shared_expert),
    Weight(MOE, "mlp.shared_experts.linear_fc2.weight", ("hidden", "shared_ffn"), _has_shared_expert),
    *_post_norm(MOE),
    Weight(LINEAR, "down", ("rank", "hidden"), lambda a: a.linear_rank > 0),
    Weight(LINEAR, "up", ("hidden", "rank"), lambda a: a.linear_rank > 0),
    Weight(LINEAR, "bias", ("hidden",)),
    *_norm("", "decoder.final_norm."),
    Weight("", OUTPUT_LAYER, ("vocab", "hidden"), lambda a: a.untie_embeddings_and_output_weights),
]
_WITH_STATE = {
    MAMBA: ("mixer.in_proj", "mixer.out_proj"),
    ATTENTION: ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"),
    MLP: ("mlp.linear_fc1", "mlp.linear_fc2"),
    MOE: ("pre_mlp_layernorm", "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"),
    LINEAR: (),
}
_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_SHARED_WITH_STATE = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_ROWS = {(weight.unit, weight.name): weight for weight in TABLE}
_LAYER_KEY = re.compile(re.escape(LAYER) + r"\.(\d+)\.(.+)")


def locate(arch: Dimensions, key: str) -> tuple[int | None, Weight]:
    """The sub-layer index (`None`: not in one) and the row of the table of a checkpoint key.

    Raises:
        CheckpointError: The model has no such weight.
    """
    layer, unit, name = None, "", key
    if match := _LAYER_KEY.fullmatch(key):
        layer, name = int(match[1]), match[2]
        unit = arch.pattern[layer] if layer < len(arch.pattern) else "none"
    weight = _ROWS.get((unit, name))
    if weight is None or not weight.exists(arch):
        raise CheckpointError(f"the model has no weight {key!r}", got=f"pattern {arch.pattern}")
    return layer, weight


def keys(arch: Dimensions) -> list[str]:
    """The checkpoint keys of all weights, in the order of the forward pass."""
    model = [weight.name for weight in TABLE if weight.unit == "" and weight.exists(arch)]
    layers = [
        f"{LAYER}.{i}.{weight.name}"
        for i, unit in enumerate(arch.pattern)
        for weight in TABLE
        if weight.unit == unit and weight.exists(arch)
    ]
    return [model[0], *layers, *model[1:]]


def modules_with_state(arch: Dimensions) -> dict[str, int]:
    """Modules that ask a checkpoint for an `_extra_state` object, on some backend; empty without FP8.

    Returns:
        Their keys, with how many such objects each has: one, or one per expert.
    """
    modules = {}
    for i, unit in enumerate(arch.pattern):
        more = _SHARED_WITH_STATE if unit == MOE and _has_shared_expert(arch) else ()
        more = _QK_NORMS if unit == ATTENTION and arch.qk_layernorm else more
        more = (*more, POST_NORM) if arch.post_norm else more
        for module in (*_WITH_STATE[unit], *more):
            modules[f"{LAYER}.{i}.{module}"] = arch.num_experts if ".experts.experts." in module else 1
    return modules | {"decoder.final_norm": 1, "output_layer": 1}


def shape(arch: Dimensions, key: str) -> tuple[int, ...]:
    """The global shape of one weight."""
    layer, weight = locate(arch, key)
    own = arch if layer is None else arch.at(layer)
    return tuple(AXES[axis].size(own) for axis in weight.axes)


def size(arch: Dimensions, key: str, *, tp: int = 1, ep: int = 1, etp: int | None = None) -> int:
    """Elements of one weight on one rank of these tensor, expert and expert tensor (`etp`: `tp`) parallel sizes."""
    ranks = {"tp": tp, "ep": ep, "etp": etp or tp, None: 1}
    return prod(shape(arch, key)) // prod(ranks[AXES[axis].split] for axis in locate(arch, key)[1].axes)


def is_expert(arch: Dimensions, key: str) -> bool:
    """Whether a weight belongs to the experts of a mixture: tokens that are not sent to one do not use its part."""
    return "expert" in locate(arch, key)[1].axes


def tensors(arch: Dimensions) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its global shape, in the order of the forward pass."""
    return {key: shape(arch, key) for key in keys(arch)}


def indices(arch: Dimensions, key: str, kept: KeptIndices) -> "tuple[Tensor | None, ...]":
    """For each dimension of a weight of `arch`, the positions that `kept` leaves of it (see `Axis`), `None` for all.

    Args:
        arch: The model that is cut.
        key: The checkpoint key of the weight in that model.
        kept: What is kept of the weight's sub-layer.
    """
    import torch

    layer, weight = locate(arch, key)
    own = arch if layer is None else arch.at(layer)
    found = (AXES[axis].index(own, kept) for axis in weight.axes)
    return tuple(None if positions is None else torch.from_numpy(positions) for positions in found)
