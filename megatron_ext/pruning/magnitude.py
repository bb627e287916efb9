"""Weight magnitude, the baseline that needs no data: the L2 norm of all weights that lie on a position."""

import torch
from torch import Tensor

from megatron_ext.checkpoint.reader import Reader
from megatron_ext.models import axes
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_ext.pruning import scores as names


def magnitudes(reader: Reader, arch: Architecture) -> dict[str, Tensor]:
    """Width scores from a checkpoint's weights alone, read one tensor at a time; float32, names as in `scores`.

    Norms and the convolution count like projections. Biases and other vectors of the residual stream do too. Query
    heads are scored by their queries and their part of the output projection, not by shared keys and values; experts
    by their weights and their row of the router.
    """
    squares: dict[tuple[int | None, str], Tensor] = {}
    for key in axes.keys(arch):
        layer, weight = axes.locate(arch, key)
        tensor = reader.read(key).double().square()
        if weight.name.endswith("expert_bias"):
            continue  # it balances the load: the less an expert is asked for, the larger
        for dimension, axis in enumerate(weight.axes):
            leading = 2 if axis.startswith("expert_") else 1  # each expert has its own neurons
            moved = tensor.movedim(dimension, leading - 1)
            total = moved.reshape(*moved.shape[:leading], -1).sum(-1)
            place = (None, axis) if axis == "hidden" else (layer, axis)
            squares[place] = squares[place] + total if place in squares else total
    result = {names.HIDDEN: squares[None, "hidden"]}
    for i, kind in enumerate(arch.pattern):
        own = arch.at(i)
        if kind == MLP:
            both = squares[i, "gate+up"].view(-1, own.ffn_hidden_size).sum(0)
            result[names.ffn(i)] = both + squares[i, "ffn"]
        elif kind == ATTENTION:
            qkv = squares[i, "qkv"].view(own.num_query_groups, -1, own.kv_channels).sum(-1)
            output = squares[i, "query_head*channel"].view(own.num_attention_heads, -1).sum(-1)
            result[names.query_head(i)] = qkv[:, :-2].flatten() + output
        elif kind == MAMBA:
            inner = squares[i, "mamba_head*channel"].view(own.mamba_num_heads, own.mamba_head_dim)
            result[names.mamba(i)] = inner
            result[names.state(i)] = squares[i, "mamba_group*state"].view(own.mamba_num_groups, own.mamba_state_dim)
        elif kind == MOE:
            result[names.expert(i)] = squares[i, "expert"] + squares[i, "routed"]
            both = squares[i, "expert_gate+up"].view(own.num_experts, -1, own.moe_ffn_hidden_size).sum(1)
            result[names.expert_ffn(i)] = both + squares[i, "expert_ffn"]
            if own.moe_shared_expert_intermediate_size:
                both = squares[i, "shared_gate+up"].view(-1, own.moe_shared_expert_intermediate_size).sum(0)
                result[names.shared_ffn(i)] = both + squares[i, "shared_ffn"]
    return {name: torch.sqrt(value).float() for name, value in result.items()}
