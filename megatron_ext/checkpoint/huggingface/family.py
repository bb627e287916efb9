"""A family of models: mappings of its tensors to Megatron's (`mappings.py`), and of `config.json` to an `Architecture`.

Both are read in both directions, so that a family is a table. Nothing of a family is known elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ext.checkpoint.huggingface.mappings import BoundMapping, ParamMapping
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE

Config = Mapping[str, Any]


class ConfigMapping(Protocol):
    """One or more entries of `config.json`, and the fields of an `Architecture` that they mean."""

    def read(self, config: Config) -> dict[str, Any]:
        """Fields, from a `config.json`; raises `CheckpointError` for what our models cannot be."""
        ...

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Entries, in the form that `like` has them; raises `CheckpointError` for what the family cannot be."""
        ...


@dataclass(frozen=True)
class Family:
    """One kind of model of Hugging Face's.

    Attributes:
        name: The class, as `config.json` names it under `architectures`.
        model_type: What it says under `model_type`.
        layer: The name of their layer `{}`.
        block: The sub-layers that are one layer of theirs, `""` if each sub-layer is one: of each the kinds that it may
            be, so that `("*", "-E")` is attention, and an MLP or a mixture of experts.
        params: Its tensors.
        config: Its configuration.
        ignored_suffixes: Ends of the names of tensors that some files hold and that are no weights.
        ignored_fields: Fields of an `Architecture` that it has no word for, and that its function does not depend on.
    """

    name: str
    model_type: str
    layer: str
    block: Sequence[str]
    params: Sequence[ParamMapping]
    config: Sequence[ConfigMapping]
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    ignored_fields: tuple[str, ...] = ()

    def read(self, config: Config) -> Architecture:
        """The model that a `config.json` describes.

        Raises:
            CheckpointError: It is one that our models cannot be; names the entry.
        """
        fields: dict[str, Any] = {}
        try:
            for mapping in self.config:
                fields |= mapping.read(config)
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
        for mapping in self.config:
            values |= mapping.write(arch, like)
        if different := self._differences(self.read(values), arch):
            raise CheckpointError(f"{self.name} cannot express this model", got=", ".join(different))
        return values

    def _differences(self, read: Architecture, arch: Architecture) -> list[str]:
        left, right = functional_fields(read), functional_fields(arch)
        names = [name for name in right if name not in self.ignored_fields and left.get(name) != right[name]]
        return [f"{name}={right[name]!r}" for name in names]

    def bind(self, arch: Architecture) -> list[BoundMapping]:
        """All tensors of a model, in the order of the forward pass.

        Args:
            arch: The model, without padding in its vocabulary.

        Raises:
            CheckpointError: The family has no word for one of its weights.
        """
        shapes = axes.tensors(arch)
        by_unit: dict[str, list[ParamMapping]] = {}
        for mapping in self.params:
            by_unit.setdefault(mapping.unit, []).append(mapping)
        bound = [each for mapping in by_unit.get("", ()) for each in mapping.bind(arch, shapes)]
        for number, units in enumerate(self._blocks(arch.pattern)):
            for unit in units:
                for mapping in by_unit.get(arch.pattern[unit], ()):
                    bound += mapping.bind(arch, shapes, unit, self._prefix(arch.pattern, number, unit))
        known = {mapping.megatron for mapping in bound}
        if missing := [key for key in shapes if key not in known]:
            raise CheckpointError(f"{self.name} has no place for {missing[0]}", got=f"{len(missing)} such weights")
        order = {key: place for place, key in enumerate(shapes)}
        return sorted(bound, key=lambda mapping: order[mapping.megatron])

    def _prefix(self, pattern: str, number: int, unit: int) -> str:
        """What the tensors of one of our sub-layers, in a layer of theirs, begin with."""
        return self.layer.format(number) + "."

    def _blocks(self, pattern: str) -> list[tuple[int, ...]]:
        """Our sub-layers that make each layer of theirs."""
        size = len(self.block) or 1
        legal = [*self.block] * (len(pattern) // size)
        if self.block and (
            len(pattern) % size or any(unit not in kinds for unit, kinds in zip(pattern, legal, strict=False))
        ):
            layer = " then ".join(" or ".join(kinds) for kinds in self.block)
            raise CheckpointError(
                f"{self.name} cannot express this layer pattern", got=pattern, legal=f"{layer!r}, repeated"
            )
        return [tuple(range(first, first + size)) for first in range(0, len(pattern), size)]


# Fields of sub-layers that a family does not have; they mean nothing, but must be legal.
_DEFAULTS: dict[str, Any] = {
    "ffn_hidden_size": 1, "num_attention_heads": 1, "num_query_groups": 1, "kv_channels": 1, "mamba_num_heads": 8,
}  # fmt: skip
_POSITIONS = (
    "rotary_base", "rotary_percent", "rope_scaling_factor", "rope_scaling", "rotary_interleaved", "local_rotary_base",
)  # fmt: skip
_OF_KIND = {
    ATTENTION: ("num_attention_heads", "num_query_groups", "kv_channels", "qk_layernorm", "qk_layernorm_of_all_heads",
                "add_qkv_bias", "position_embedding_type", "softmax_scale", "attention_softcap", *_POSITIONS),
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
    MLP: ("ffn_hidden_size",),
    LINEAR: ("linear_rank",),
}  # fmt: skip


def functional_fields(arch: Architecture) -> dict[str, Any]:
    """The fields of a model that its function depends on."""
    values = arch.to_dict()
    for kind, names in _OF_KIND.items():
        if kind not in arch.pattern:
            values = {name: value for name, value in values.items() if name not in names}
    if MLP not in arch.pattern and MOE not in arch.pattern:
        del values["activation"], values["gated_linear_unit"]
    if MOE in arch.pattern and values["moe_router_topk_scaling_factor"] is None:
        values["moe_router_topk_scaling_factor"] = 1.0
    if ATTENTION in arch.pattern and arch.softmax_scale == arch.kv_channels**-0.5:
        values["softmax_scale"] = None
    if not arch.attention_windows:
        values.pop("local_rotary_base", None)
    if arch.position_embedding_type == "none":
        for name in (
            "rotary_base",
            "rotary_percent",
            "rope_scaling_factor",
            "rope_scaling",
            "rotary_interleaved",
            "local_rotary_base",
        ):
            values.pop(name, None)
    return values
