"""Mappings between tensors of a Hugging Face layer and parts of Megatron's weights, read in both directions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.stream import Part
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MLP

PartOf = Callable[[Architecture, Tensor], Tensor]


def whole(arch: Architecture, weight: Tensor) -> Tensor:
    """All of a weight."""
    return weight


def unpadded(arch: Architecture, weight: Tensor) -> Tensor:
    """The rows of an embedding that are tokens; `arch` is the model without padding."""
    return weight[: arch.padded_vocab_size]


@dataclass(frozen=True)
class ParamMapping:
    """One row of a family's table: a tensor of a Hugging Face layer, or rows of it, is a part of a Megatron weight.

    Attributes:
        unit: The kind of sub-layer, `""` for the model.
        hf: The tensor's name in its layer. With `{expert}` in it, one tensor for each expert.
        megatron: The weight's key in its sub-layer.
        part: The part of the weight, as a view whose entries are in the order of the tensor, which has its leading
            dimensions as one.
        row_offset: Rows of the tensor that come before.
        exists: Whether a model that has the weight has it in this way.
    """

    unit: str
    hf: str
    megatron: str
    part: PartOf = whole
    row_offset: Callable[[Architecture], int] = lambda arch: 0
    exists: Callable[[Architecture], bool] = lambda arch: True

    def bind(
        self, arch: Architecture, shapes: Mapping[str, tuple[int, ...]], layer: int | None = None, hf_layer: str = ""
    ) -> "Iterator[BoundMapping]":
        """The tensors that this row is in one sub-layer of a model, or in the model itself.

        Args:
            arch: The model.
            shapes: Its weights.
            layer: The sub-layer, one of the kind `unit`.
            hf_layer: The name of the Hugging Face layer, with a dot.
        """
        key = self.megatron if layer is None else f"{axes.LAYER}.{layer}.{self.megatron}"
        if key not in shapes or not self.exists(arch):
            return
        own = arch if layer is None else arch.at(layer)
        for expert in range(own.num_experts) if "{expert}" in self.hf else (None,):
            part = partial(_part, self.part, own, expert)
            first, seen = self.row_offset(own), part(torch.empty(shapes[key], device="meta"))
            rows = _hf_shape(seen, len(shapes[key]))[0]
            yield BoundMapping(hf_layer + self.hf.format(expert=expert), first, first + rows, key, part)


@dataclass(frozen=True)
class BoundMapping:
    """A `ParamMapping` in one model: rows `first` to `stop` of a Hugging Face tensor are this part of a weight."""

    hf: str
    first: int
    stop: int
    megatron: str
    part: Callable[[Tensor], Tensor]

    def from_hf(self) -> Part:
        """What the tensor contributes to the weight."""
        return Part(self.hf, (self.first, self.stop), place=self.part)

    def to_hf(self, weight: TensorEntry, rows: int) -> Part:
        """What the weight contributes to the tensor, which has so many rows."""
        seen = self.part(torch.empty(weight.shape, device="meta"))
        view = None if seen.is_contiguous() and seen.numel() == weight.count else self.part
        place = None if (self.first, self.stop) == (0, rows) else partial(_rows, first=self.first, stop=self.stop)
        return Part(self.megatron, view=view, place=place)


def hf_shapes(arch: Architecture, mappings: list[BoundMapping]) -> dict[str, tuple[int, ...]]:
    """All tensors of the Hugging Face model."""
    weights = {key: torch.empty(shape, device="meta") for key, shape in axes.tensors(arch).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for mapping in mappings:
        weight = weights[mapping.megatron]
        rest = _hf_shape(mapping.part(weight), weight.dim())[1:]
        rows = max(mapping.stop, shapes.get(mapping.hf, (0,))[0])
        shapes[mapping.hf] = (rows, *rest)
    return shapes


def qkv_mapping(hf: str, megatron: str, unit: str = ATTENTION) -> list[ParamMapping]:
    """Query, key and value projections: in Megatron one weight, by key/value group its query heads, a key, a value.

    Args:
        hf: The name of the tensors, with `{}` for `q`, `k` and `v`.
        megatron: The key of the weight.
        unit: The kind of sub-layer.
    """
    return [ParamMapping(unit, hf.format(name), megatron, part) for name, part in zip("qkv", _QKV, strict=True)]


def gated_mlp_mapping(
    gate: str, up: str, megatron: str, unit: str = MLP, **conditions: Callable[[Architecture], bool]
) -> list[ParamMapping]:
    """Gate and up projection of an MLP: in Megatron one weight, one above the other."""
    return [
        ParamMapping(unit, name, megatron, partial(_half, half), **conditions) for half, name in enumerate((gate, up))
    ]


def fused_qkv_mapping(hf: str, megatron: str) -> list[ParamMapping]:
    """One tensor of all query heads, then all keys, then all values; see `qkv_mapping`."""

    def before(groups: int) -> Callable[[Architecture], int]:
        return lambda arch: (arch.num_attention_heads + groups * arch.num_query_groups) * arch.kv_channels

    offsets = (lambda arch: 0, before(0), before(1))
    return [
        ParamMapping(ATTENTION, hf, megatron, part, row_offset=offset)
        for part, offset in zip(_QKV, offsets, strict=True)
    ]


def _heads(arch: Architecture, weight: Tensor) -> Tensor:
    """(group, head, channel, ...)"""
    return weight.view(arch.num_query_groups, -1, arch.kv_channels, *weight.shape[1:])


_QKV: tuple[PartOf, ...] = (
    lambda arch, weight: _heads(arch, weight)[:, :-2],
    lambda arch, weight: _heads(arch, weight)[:, -2],
    lambda arch, weight: _heads(arch, weight)[:, -1],
)


def _half(number: int, arch: Architecture, weight: Tensor) -> Tensor:
    return weight.unflatten(0, (2, -1))[number]


def _part(part: PartOf, arch: Architecture, expert: int | None, weight: Tensor) -> Tensor:
    return part(arch, weight if expert is None else weight[expert])


def _rows(tensor: Tensor, first: int, stop: int) -> Tensor:
    return tensor[first:stop]


def _hf_shape(part: Tensor, dimensions: int) -> tuple[int, ...]:
    """The shape of the rows that a part of a weight of so many dimensions is."""
    rest = min(part.dim(), dimensions) - 1
    return (prod(part.shape[: part.dim() - rest]), *part.shape[part.dim() - rest :])
