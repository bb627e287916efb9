"""Mappings between entries of `config.json` and fields of an `Architecture`; see `family.ConfigMapping`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_ext.checkpoint.huggingface.entries import flag, number, whole
from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.checkpoint.huggingface.rope_scalings import ORIGINAL, read_scaling, written_scaling
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

_READ = {int: whole, float: number, float | None: number, bool: flag}
_FIELDS = get_type_hints(Architecture)


@dataclass(frozen=True)
class Renamed:
    """An entry that is a field under another name; `default` is transformers' own where it is missing."""

    hf: str
    megatron: str
    default: Any | Callable[[Config], Any] = None

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        return {self.megatron: _READ[_FIELDS[self.megatron]](config, self.hf, self.default)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {self.hf: getattr(arch, self.megatron)}


@dataclass(frozen=True)
class Nullable:
    """An entry that is a number or null, where null is no default; `missing` is transformers' own."""

    hf: str
    megatron: str
    missing: float | None

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        given = config.get(self.hf, self.missing)
        return {self.megatron: None if given is None else number(config, self.hf, self.missing)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {self.hf: getattr(arch, self.megatron)}


class Required:
    """An entry of which Megatron knows these values only; the first is written."""

    def __init__(self, hf: str, *legal: Any) -> None:
        self.hf, self.legal = hf, legal

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing, but refuses other values."""
        value = config.get(self.hf, self.legal[0])
        if value not in self.legal:
            raise CheckpointError(
                f"config.json: {self.hf!r} is not supported",
                got=repr(value),
                legal=" or ".join(map(repr, self.legal)),
            )
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry as it was, or the first value."""
        return {self.hf: like.get(self.hf, self.legal[0])}


class Fixed:
    """Fields that a family has no entry for, because they are always so."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        return dict(self.fields)

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Layers:
    """The number of their layers, each of these sub-layers."""

    block: str
    hf: str = "num_hidden_layers"
    default: int | None = None

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern."""
        return {"pattern": self.block * whole(config, self.hf, self.default)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Their number."""
        return {self.hf: len(arch.pattern) // len(self.block)}


@dataclass(frozen=True)
class Tied:
    """Whether the output layer is the word embedding."""

    default: bool = False

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        return {"untie_embeddings_and_output_weights": not flag(config, "tie_word_embeddings", self.default)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {"tie_word_embeddings": not arch.untie_embeddings_and_output_weights}


@dataclass(frozen=True)
class Biases:
    """Entries that each give biases to some linear layers; we can have all or none."""

    names: Sequence[str]

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        values = {name: flag(config, name, False) for name in self.names}
        if len(set(values.values())) > 1:
            raise CheckpointError(
                "config.json: biases in some linear layers only", got=values, legal=f"{' and '.join(self.names)} alike"
            )
        return {"add_bias_linear": all(values.values())}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        return dict.fromkeys(self.names, arch.add_bias_linear)


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, share of the channels, their scaling (`rope_scalings.py`).

    transformers 5 keeps them in `rope_parameters`, versions before in `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`; what all versions read is written, unless the model was saved by the new one.

    Attributes:
        percent: The share of the channels of a head that are rotated, where the entry is missing.
        partial: Whether the class rotates a part of them at all; others ignore the entry.
        base: `rope_theta` where the entry is missing.
        interleaved: Whether neighbouring channels turn together.
        original: `original_max_position_embeddings`, where the class has such an entry of its own.
    """

    percent: float = 1.0
    partial: bool = False
    base: float = 10000.0
    interleaved: bool = False
    original: int | None = None

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        rope = _rope(config)
        base = number(rope, "rope_theta", self.base)
        if base != int(base) or base < 1:
            raise CheckpointError("config.json: the RoPE base must be a whole number", got=base)
        percent = number(rope, "partial_rotary_factor", self.percent)
        if not 0 < percent <= 1:
            raise CheckpointError(
                "config.json: 'partial_rotary_factor' is no share", got=percent, legal="above 0, to 1"
            )
        if percent != 1 and not self.partial:
            raise CheckpointError(
                "config.json: 'partial_rotary_factor' is ignored by transformers' class, not by all", got=percent,
                legal="1, or no such entry, if whole heads are to be rotated, as transformers does",
            )  # fmt: skip
        positions = {"position_embedding_type": "rope", "rotary_base": int(base), "rotary_percent": percent}
        return positions | {"rotary_interleaved": self.interleaved} | read_scaling(rope, config, self.original)

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries; refuses what the class ignores."""
        if arch.position_embedding_type != "rope":
            raise CheckpointError("the family has rotary positions, the model has none")
        if arch.rotary_percent != 1 and not self.partial:
            raise CheckpointError(
                "the class rotates whole heads, the model a part of them", got=arch.rotary_percent,
                legal="NemotronForCausalLM, HybridForCausalLM",
            )  # fmt: skip
        theta: dict[str, Any] = {"rope_theta": float(arch.rotary_base)}
        part = {"partial_rotary_factor": arch.rotary_percent} if self.percent != 1 or arch.rotary_percent != 1 else {}
        scaling = written_scaling(arch)
        outer = {}
        if ORIGINAL in scaling and (self.original is not None or ORIGINAL in like):  # which would be read before
            outer = {ORIGINAL: scaling[ORIGINAL]}
        if "rope_parameters" in like:
            old = {"rope_scaling": None} if "rope_scaling" in like else {}  # which would be read before
            return {"rope_parameters": theta | part | (scaling or {"rope_type": "default"}), **old, **outer}
        return theta | part | {"rope_scaling": scaling or None, **outer}


def _rope(config: Config) -> dict[str, Any]:
    """All entries about rotary positions, those of the dictionary first; `rope_scaling` hides `rope_parameters`."""
    own = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(own, Mapping) or any(isinstance(value, Mapping) for value in own.values()):
        raise CheckpointError(
            "config.json: rotary positions that differ by kind of layer", got=own, legal="one set for all layers"
        )
    outer = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return outer | {key: value for key, value in own.items() if value is not None}
