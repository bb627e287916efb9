"""Weight magnitude, the baseline that needs no data: the L2 norm of all weights that lie on a position."""

import torch
from torch import Tensor

from megatron_ext.checkpoint.stream import Reader
from megatron_ext.models import axes
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP
from megatron_ext.pruning import scores as names


def magnitudes(reader: Reader, arch: Architecture) -> dict[str, Tensor]:
    """Width scores from a checkpoint's weights alone, read one tensor at a time; float32, names as in `scores`.

    Norms and the convolution count like projections. Biases and other vectors of the residual stream do too. Query
    heads are scored by their queries and their part of the output projection, not by shared keys and values.
    """
    squares: dict[tuple[int | None, str], Tensor] = {}
    for key in axes.keys(arch):
        layer, weight = axes.locate(arch, key)
        tensor = reader.read(key).double().square()
        for dimension, axis in enumerate(weight.axes):
            total = tensor.transpose(0, dimension).flatten(1).sum(1) if tensor.dim() > 1 else tensor
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
    return {name: torch.sqrt(value).float() for name, value in result.items()}
