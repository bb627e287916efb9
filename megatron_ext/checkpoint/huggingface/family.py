"""What a family is: rows that say which of its tensors is which part of ours, and entries that do so for `config.json`.

Both are read in both directions, so that a family is a table. Nothing of a family is known elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE

Config = Mapping[str, Any]
Part = Callable[[Architecture, Tensor], Tensor]


class Setting(Protocol):
    """One or more entries of `config.json`, and the fields of an `Architecture` that they mean."""

    def read(self, config: Config) -> dict[str, Any]:
        """Fields, from a `config.json`; raises `CheckpointError` for what our models cannot be."""
        ...

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Entries, in the form that `like` has them; raises `CheckpointError` for what the family cannot be."""
        ...


def whole(arch: Architecture, ours: Tensor) -> Tensor:
    """All of a weight."""
    return ours


def words(arch: Architecture, ours: Tensor) -> Tensor:
    """The rows of an embedding that are words, without padding; `arch` is the model without it."""
    return ours[: arch.vocab_size]


@dataclass(frozen=True)
class Link:
    """One row of a family's table: a tensor of theirs, or rows of it, is a part of a weight of ours.

    Attributes:
        unit: The kind of sub-layer, `""` for the model.
        theirs: The tensor's name in their layer. With `{expert}` in it, one tensor for each expert.
        ours: The weight's key in our sub-layer.
        part: The part of our weight, as a view whose entries are in their order; leading dimensions are one of theirs.
        before: Rows of their tensor that come before.
        exists: Whether a model that has our weight has it in this way.
    """

    unit: str
    theirs: str
    ours: str
    part: Part = whole
    before: Callable[[Architecture], int] = lambda arch: 0
    exists: Callable[[Architecture], bool] = lambda arch: True


@dataclass(frozen=True)
class Piece:
    """A `Link` in one model: rows `first` to `stop` of their tensor are this part of our weight."""

    theirs: str
    first: int
    stop: int
    ours: str
    part: Callable[[Tensor], Tensor]

    def view(self, ours: Tensor) -> Tensor:
        """The part of our weight."""
        return self.part(ours)


@dataclass(frozen=True)
class Family:
    """One kind of model of Hugging Face's.

    Attributes:
        name: The class, as `config.json` names it under `architectures`.
        model_type: What it says under `model_type`.
        layer: The name of their layer `{}`.
        block: The sub-layers that are one layer of theirs, `""` if each sub-layer is one.
        links: Its tensors.
        settings: Its configuration.
        without: Tensors that some files hold and that are no weights, by the end of their name.
        free: Fields of an `Architecture` that it has no word for, and that its function does not depend on.
    """

    name: str
    model_type: str
    layer: str
    block: str
    links: Sequence[Link]
    settings: Sequence[Setting]
    without: tuple[str, ...] = ("rotary_emb.inv_freq",)
    free: tuple[str, ...] = ()

    def read(self, config: Config) -> Architecture:
        """The model that a `config.json` describes.

        Raises:
            CheckpointError: It is one that our models cannot be; names the entry.
        """
        fields: dict[str, Any] = {}
        try:
            for setting in self.settings:
                fields |= setting.read(config)
            return Architecture(**_DEFAULTS | fields)
        except MegatronExtError:
            raise
        except KeyError as error:
            raise CheckpointError(f"config.json has no {error}") from error
        except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise CheckpointError(f"config.json has an entry of a wrong kind: {error}") from error

    def write(self, arch: Architecture, like: Config | None = None) -> dict[str, Any]:
        """`config.json` for a model, with everything else that `like` says; `like` itself if it describes the model.

        Raises:
            CheckpointError: The family has no such models; names what it cannot express.
        """
        like = dict(like or {})
        if like:
            try:
                if not self._differences(self.read(like), arch):
                    return like
            except CheckpointError:
                pass  # what cannot be read is written anew
        self._blocks(arch.pattern)
        values = dict(like) if like else {"architectures": [self.name], "model_type": self.model_type}
        for setting in self.settings:
            values |= setting.write(arch, like)
        if different := self._differences(self.read(values), arch):
            raise CheckpointError(f"{self.name} cannot express this model", got=", ".join(different))
        return values

    def _differences(self, told: Architecture, arch: Architecture) -> list[str]:
        left, right = meaning(told), meaning(arch)
        names = [name for name in right if name not in self.free and left.get(name) != right[name]]
        return [f"{name}={right[name]!r}" for name in names]

    def pieces(self, arch: Architecture) -> list[Piece]:
        """All tensors of a model, in the order of the forward pass.

        Args:
            arch: The model, without padding in its vocabulary.

        Raises:
            CheckpointError: The family has no word for one of its weights.
        """
        shapes = axes.tensors(arch)
        blocks = self._blocks(arch.pattern)
        found = list(self._linked("", "", arch, arch, shapes))
        for number, units in enumerate(blocks):
            prefix = self.layer.format(number) + "."
            for unit in units:
                found += self._linked(prefix, f"{axes.LAYER}.{unit}.", arch, arch.at(unit), shapes, arch.pattern[unit])
        if untold := [key for key in shapes if key not in {piece.ours for piece in found}]:
            raise CheckpointError(f"{self.name} has no place for {untold[0]}", got=f"{len(untold)} such weights")
        order = {key: place for place, key in enumerate(shapes)}
        return sorted(found, key=lambda piece: order[piece.ours])

    def _linked(
        self,
        prefix: str,
        own_prefix: str,
        arch: Architecture,
        own: Architecture,
        shapes: Mapping[str, Any],
        unit: str = "",
    ) -> Iterator[Piece]:
        for link in self.links:
            key = own_prefix + link.ours
            if link.unit != unit or key not in shapes or not link.exists(arch):
                continue
            for expert in range(own.num_experts) if "{expert}" in link.theirs else (None,):
                part = _bound(link.part, own, expert)
                first = link.before(own)
                rows = their_shape(part(torch.empty(shapes[key], device="meta")), len(shapes[key]))[0]
                yield Piece(prefix + link.theirs.format(expert=expert), first, first + rows, key, part)

    def _blocks(self, pattern: str) -> list[tuple[int, ...]]:
        """Our sub-layers that make each layer of theirs."""
        size = len(self.block) or 1
        if self.block and pattern != self.block * (len(pattern) // size):
            raise CheckpointError(
                f"{self.name} cannot express this layer pattern", got=pattern, legal=f"{self.block!r}, repeated"
            )
        return [tuple(range(first, first + size)) for first in range(0, len(pattern), size)]


def _bound(part: Part, arch: Architecture, expert: int | None) -> Callable[[Tensor], Tensor]:
    return lambda ours: part(arch, ours if expert is None else ours[expert])


def their_shape(view: Tensor, dimensions: int) -> tuple[int, ...]:
    """The shape of the rows of their tensor that a part of our weight of so many dimensions is."""
    rest = min(view.dim(), dimensions) - 1
    return (prod(view.shape[: view.dim() - rest]), *view.shape[view.dim() - rest :])


# Fields of sub-layers that a family does not have; they mean nothing, but must be legal.
_DEFAULTS: dict[str, Any] = {
    "ffn_hidden_size": 1, "num_attention_heads": 1, "num_query_groups": 1, "kv_channels": 1, "mamba_num_heads": 8,
}  # fmt: skip
_OF_KIND = {
    ATTENTION: ("num_attention_heads", "num_query_groups", "kv_channels", "qk_layernorm", "add_qkv_bias",
                "position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling_factor"),
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
    MLP: ("ffn_hidden_size",),
}  # fmt: skip


def meaning(arch: Architecture) -> dict[str, Any]:
    """The fields of a model that its function depends on."""
    values = arch.to_dict()
    for kind, names in _OF_KIND.items():
        if kind not in arch.pattern:
            values = {name: value for name, value in values.items() if name not in names}
    if MLP not in arch.pattern and MOE not in arch.pattern:
        del values["activation"], values["gated_linear_unit"]
    if MOE in arch.pattern and values["moe_router_topk_scaling_factor"] is None:
        values["moe_router_topk_scaling_factor"] = 1.0
    if arch.position_embedding_type == "none":
        for name in ("rotary_base", "rotary_percent", "rope_scaling_factor"):
            values.pop(name, None)
    return values
