"""What a model is, as one frozen value: enough to count, slice, build and convert it, and nothing about how it runs."""

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd, prod
from typing import Any, Self

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.models import axes
from megatron_ext.models.dimensions import Dimensions
from megatron_ext.models.megatron_args import arguments_of, fields_of, flags_of
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE

CONV_KERNEL = axes.CONV_KERNEL
FORMER_NAMES = {"vocab_size": "padded_vocab_size"}
"""Of fields, in plans, scores and results that earlier versions wrote."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Dimensions):
    """One `HybridModel`, whatever its family: its dimensions, counted, checked against a layout, and as flags."""

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Parameters in all; without the word embedding and the output layer if not `embedding`."""
        return sum(
            prod(shape)
            for key, shape in axes.tensors(self).items()
            if embedding or key not in (axes.EMBEDDING, axes.OUTPUT_LAYER)
        )

    def num_active_parameters(self, *, embedding: bool = True) -> int:
        """Parameters that one token runs through: of the experts, those that it is sent to; see `num_parameters`."""
        idle = 0
        if self.num_experts:
            idle = self.num_expert_parameters() // self.num_experts * (self.num_experts - self.moe_router_topk)
        return self.num_parameters(embedding=embedding) - idle

    def num_expert_parameters(self) -> int:
        """Parameters of all experts; the router and shared experts, which every token uses, are not counted."""
        return sum(axes.size(self, key) for key in axes.tensors(self) if axes.is_expert(self, key))

    def validate(self, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None) -> None:
        """Check what must divide, for tensor, pipeline, expert and expert tensor parallel sizes (`etp`: `tp`).

        Raises:
            ConfigError: Names every size that does not divide, and the nearest sizes or layouts that would.
        """
        kinds = set(self.pattern)
        wrong = []

        def divides(name: str, by: int, reason: str) -> None:
            for value in dict.fromkeys(self.layer_sizes.get(name, (getattr(self, name),))):
                if value % by == 0:
                    continue
                near = [n for n in (value // by * by, (value // by + 1) * by) if n]
                wrong.append(f"{name}={value} does not divide by {reason}={by} (nearest: {', '.join(map(str, near))})")

        if ATTENTION in kinds:
            divides("num_attention_heads", self.num_query_groups, "num_query_groups")
            divides("num_query_groups", tp, "tensor parallel size")
        if MAMBA in kinds:
            divides("mamba_num_heads", self.mamba_num_groups, "mamba_num_groups")
            divides("mamba_num_groups", tp, "tensor parallel size")
            divides("mamba_num_heads", tp, "tensor parallel size")
        if MLP in kinds:
            divides("ffn_hidden_size", tp, "tensor parallel size")
        if MOE in kinds:
            divides("num_experts", ep, "expert parallel size")
            divides("moe_ffn_hidden_size", etp or tp, "expert tensor parallel size")
            divides("moe_shared_expert_intermediate_size", tp, "tensor parallel size")
        elif ep > 1:
            wrong.append(f"expert parallel size={ep}, and the model has no mixture of experts")
        divides("num_attention_heads", tp, "tensor parallel size")  # Megatron insists, attention or not
        divides("padded_vocab_size", tp, "tensor parallel size")
        if pp > len(self.pattern):
            wrong.append(f"{len(self.pattern)} sub-layers are fewer than pipeline parallel size={pp}")
        if wrong:
            legal_tp = ", ".join(map(str, self._legal_tp()))
            raise ConfigError(
                "the model does not fit the layout:\n    " + "\n    ".join(wrong),
                got=f"tensor parallel {tp}, pipeline parallel {pp}" + (f", expert parallel {ep}" if ep > 1 else ""),
                legal=f"tensor parallel {legal_tp}; pipeline parallel up to {len(self.pattern)}",
            )

    def _legal_tp(self) -> list[int]:
        """Tensor parallel sizes, up to 64, that the sizes allow."""
        common = gcd(self.num_attention_heads, self.padded_vocab_size)
        if ATTENTION in self.pattern:
            common = gcd(common, self.num_query_groups)
        if MOE in self.pattern:
            common = gcd(common, self.moe_shared_expert_intermediate_size)  # 0: whatever it was
        if MAMBA in self.pattern:
            heads = self.layer_sizes.get("mamba_num_heads", (self.mamba_num_heads,))
            common = gcd(common, self.mamba_num_groups, *heads)
        if MLP in self.pattern:
            common = gcd(common, *self.layer_sizes.get("ffn_hidden_size", (self.ffn_hidden_size,)))
        return [tp for tp in range(1, min(common, 64) + 1) if common % tp == 0]

    @classmethod
    def from_args(cls, args: Namespace) -> Self:
        """From Megatron's parsed arguments, before or after `validate_args`.

        Raises:
            ConfigError: A required argument is missing or asks for something this class cannot say.
        """
        return cls(**fields_of(args, [field.name for field in fields(cls)]))

    def to_flags(self, but: Collection[str] = ()) -> list[str]:
        """Megatron's command line flags for this model: `from_args` of them, parsed, is this model again.

        Args:
            but: Fields that are left to others to say.
        """
        return flags_of({name: value for name, value in self._values().items() if name not in but})

    def to_args(self) -> dict[str, Any]:
        """Megatron's parsed arguments for this model, as a checkpoint keeps them: `from_args` gives it back."""
        return arguments_of(self._values())

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From `to_dict`'s values; also from those of earlier versions, which had other names for some.

        Raises:
            ConfigError: A field is unknown or missing.
        """
        values = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"unknown field {name!r} of an architecture", legal=nearest(name, names))
        try:
            return cls(**values)
        except TypeError as error:  # a required field is missing
            raise ConfigError(f"incomplete architecture: {error}", legal=", ".join(names)) from None
