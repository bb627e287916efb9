"""What a model is, as one frozen value: enough to count, slice, build and convert it, and nothing about how it runs."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd, prod
from typing import Any, Self

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.models import axes
from megatron_ext.models.dimensions import ACTIVATIONS, Dimensions
from megatron_ext.models.megatron_args import MIXTURE, fields_of
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
        return cls(**fields_of(args))

    def to_flags(self) -> list[str]:
        """Megatron's command line flags for this model: `from_args` of them, parsed, is this model again."""
        values = {
            "hidden-size": self.hidden_size, "padded-vocab-size": self.padded_vocab_size,
            "max-position-embeddings": self.max_position_embeddings, "ffn-hidden-size": self.ffn_hidden_size,
            "num-attention-heads": self.num_attention_heads, "kv-channels": self.kv_channels,
            "num-query-groups": self.num_query_groups,
            "mamba-num-heads": self.mamba_num_heads, "mamba-head-dim": self.mamba_head_dim,
            "mamba-state-dim": self.mamba_state_dim, "mamba-num-groups": self.mamba_num_groups,
            "normalization": self.normalization, "norm-epsilon": repr(self.norm_epsilon),
            "position-embedding-type": self.position_embedding_type,
            "rotary-base": self.rotary_base, "rotary-percent": repr(self.rotary_percent),
        }  # fmt: skip
        # One word: a pattern that begins with "-" would be taken for a flag.
        flags = [f"--hybrid-layer-pattern={self.pattern}", "--group-query-attention"]
        for name, value in values.items():
            flags += [f"--{name}", str(value)]
        flags += ACTIVATIONS[self.gated_linear_unit, self.activation]
        if self.zero_centered_norm:
            flags += ["--apply-layernorm-1p"]
        if self.rope_scaling_factor is not None:
            flags += ["--use-rope-scaling", "--rope-scaling-factor", repr(self.rope_scaling_factor)]
        if not self.add_bias_linear:
            flags += ["--disable-bias-linear"]
            if self.add_qkv_bias:
                flags += ["--add-qkv-bias"]
        if self.qk_layernorm:
            flags += ["--qk-layernorm"]
        if self.untie_embeddings_and_output_weights:
            flags += ["--untie-embeddings-and-output-weights"]
        if MOE in self.pattern:
            for name, value in self.mixture_args().items():
                flag = f"--{name.replace('_', '-')}"
                flags += [flag] if value is True else [flag, str(value)] if value else []
        if self.layer_sizes:
            flags += ["--ext-layer-sizes", self.layer_sizes_text]
        return flags

    @property
    def layer_sizes_text(self) -> str:
        """`layer_sizes` as the flag `--ext-layer-sizes` takes it: `ffn_hidden_size=96,80 mamba_num_heads=8,4`."""
        return " ".join(f"{name}={','.join(map(str, sizes))}" for name, sizes in self.layer_sizes.items())

    def to_args(self) -> dict[str, Any]:
        """Megatron's parsed arguments for this model, as a checkpoint keeps them: `from_args` gives it back."""
        return {
            "hybrid_layer_pattern": self.pattern, "num_layers": len(self.pattern), "hidden_size": self.hidden_size,
            "padded_vocab_size": self.padded_vocab_size, "max_position_embeddings": self.max_position_embeddings,
            "ffn_hidden_size": self.ffn_hidden_size, "swiglu": self.gated_linear_unit, "quick_geglu": False,
            "squared_relu": self.activation == "squared_relu",
            "num_attention_heads": self.num_attention_heads, "group_query_attention": True,
            "num_query_groups": self.num_query_groups, "kv_channels": self.kv_channels,
            "mamba_num_heads": self.mamba_num_heads, "mamba_head_dim": self.mamba_head_dim,
            "mamba_state_dim": self.mamba_state_dim, "mamba_num_groups": self.mamba_num_groups,
            "normalization": self.normalization, "layernorm_epsilon": self.norm_epsilon,
            "layernorm_zero_centered_gamma": self.zero_centered_norm,
            "position_embedding_type": self.position_embedding_type, "add_position_embedding": True,
            "rotary_base": self.rotary_base, "rotary_percent": self.rotary_percent,
            "use_rope_scaling": self.rope_scaling_factor is not None,
            "rope_scaling_factor": self.rope_scaling_factor or 8.0,
            "add_bias_linear": self.add_bias_linear, "add_qkv_bias": self.add_qkv_bias,
            "qk_layernorm": self.qk_layernorm,
            "untie_embeddings_and_output_weights": self.untie_embeddings_and_output_weights,
            "ext_layer_sizes": self.layer_sizes_text, **self.mixture_args(),
        }  # fmt: skip

    def mixture_args(self) -> dict[str, Any]:
        """The part of `to_args` that says which experts there are; Megatron's word for no such size is `None`."""
        values = {name: getattr(self, name) for name in MIXTURE}
        return {name: value if value or value is False else None for name, value in values.items()}

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
