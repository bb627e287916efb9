"""Weight magnitude, the baseline that needs no data: the L2 norm of all weights that lie on a position."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.blocks import ReusableBuffer
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_ext.pruning import scores as names

ELEMENTS = 2**22  # squared in float64 at a time


def magnitudes(reader: CheckpointReader, arch: Architecture) -> dict[str, Tensor]:
    """Width scores from a checkpoint's weights alone; float32, names as in `scores`. A collective of all processes.

    Each process reads a share of the tensors, one at a time, and squares some rows of it at once: memory holds the
    largest tensor in the type it was saved in. The scores do not depend on how many processes there are.

    Norms and the convolution count like projections. Biases and other vectors of the residual stream do too. Query
    heads are scored by their queries and their part of the output projection, not by shared keys and values; experts
    by their weights and their row of the router.
    """
    # A bias that balances the load of experts does not count: the less one is asked for, the larger.
    keys = [key for key in axes.keys(arch) if not key.endswith("expert_bias")]
    owners = ranks.balance_by_size([prod(reader.shapes[key]) for key in keys])
    memory = ReusableBuffer()
    own = {
        key: _squares(arch, key, reader.read(key, memory))
        for key, owner in zip(keys, owners, strict=True)
        if owner == ranks.rank()
    }
    parts = {key: totals for part in ranks.gather(own) for key, totals in part.items()}
    squares: dict[tuple[int | None, str], Tensor] = {}
    for key in keys:  # in one order, whoever read them
        layer, weight = axes.locate(arch, key)
        for axis, total in zip(weight.axes, parts[key], strict=True):
            place = (None if axis == "hidden" else layer, axis)
            squares[place] = squares[place] + total if place in squares else total
    return {name: torch.sqrt(value).float() for name, value in _scores(arch, squares).items()}


def _squares(arch: Architecture, key: str, tensor: Tensor) -> list[Tensor]:
    """For each axis of a weight, the sum of squares on each of its positions, (size,), or (experts, size) of theirs."""
    _, weight = axes.locate(arch, key)
    kept = [(0, i) if axis.startswith("expert_") else (i,) for i, axis in enumerate(weight.axes)]
    totals = [torch.zeros([tensor.shape[i] for i in own], dtype=torch.float64) for own in kept]
    for block in _blocks(tensor.shape):
        squares = tensor[block].double().square_()
        for own, total in zip(kept, totals, strict=True):
            others = [i for i in range(tensor.dim()) if i not in own]
            total[tuple(block[i] for i in own)] += squares.sum(others) if others else squares
    return totals


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """All of a tensor of this shape, some rows at a time, or some rows of one matrix after the other."""
    row = prod(shape[1:])
    if row > ELEMENTS:
        for place in range(shape[0]):
            yield from ((slice(place, place + 1), *block) for block in _blocks(shape[1:]))
        return
    step = max(1, ELEMENTS // max(row, 1))
    for first in range(0, shape[0], step):
        yield (slice(first, first + step), *[slice(None)] * (len(shape) - 1))


def _scores(arch: Architecture, squares: Mapping[tuple[int | None, str], Tensor]) -> dict[str, Tensor]:
    """By their names, the sums of squares that lie on each position."""
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
    return result
