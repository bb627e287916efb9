"""What a model is, as one frozen value: enough to count, slice, build and convert it, and nothing about how it runs."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import gcd, prod
from typing import Any, Literal, Self

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.models import axes
from megatron_ext.models.megatron_args import MIXTURE, fields_of
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE, Pattern, parse

CONV_KERNEL = axes.CONV_KERNEL
# Megatron's flags cannot say any other combination of gating and activation.
_ACTIVATIONS = {(True, "silu"): ["--swiglu"], (False, "gelu"): [], (False, "squared_relu"): ["--squared-relu"]}
# Sizes that may differ from layer to layer, and the kind of layer that has them.
PER_LAYER = {"ffn_hidden_size": MLP, "mamba_num_heads": MAMBA}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `HybridModel`, whatever its family. All sizes are global, before any parallel split.

    Attributes:
        pattern: Sub-layers, one character each (see `megatron_ext.models.pattern`). Pipeline borders are dropped:
            they belong to a run, not to a model.
        vocab_size: Rows of the embedding, padding included.
        num_query_groups: Key/value heads; `num_attention_heads` for plain multi-head attention.
        kv_channels: Channels per attention head.
        mamba_num_heads: Heads of a Mamba-2 layer; its inner width is `mamba_num_heads * mamba_head_dim`.
        zero_centered_norm: Norm weights are stored minus one (Megatron's `--apply-layernorm-1p`).
        qk_layernorm: Norms on the channels of each query and key head (Qwen3).
        rope_scaling_factor: Llama 3.1's frequency scaling, `None` for plain RoPE.
        num_experts: Experts of a mixture, of which each token runs through `moe_router_topk`, and all tokens through
            the shared expert; 0 (as the other sizes) where the pattern has no mixture of experts.
        moe_ffn_hidden_size: Neurons of one expert.
        moe_shared_expert_intermediate_size: Neurons of the shared expert, 0 for none.
        moe_router_score_function: How router logits become probabilities: a softmax over the chosen experts (over all
            of them if `moe_router_pre_softmax`), or sigmoids divided by the sum of the chosen ones.
        moe_router_topk_scaling_factor: What the probabilities are multiplied by, `None` for nothing.
        moe_router_enable_expert_bias: A bias for each expert that only counts when experts are chosen.
        layer_sizes: Sizes that differ from layer to layer: for `ffn_hidden_size` or `mamba_num_heads`, one for each
            layer of the kind, in the pattern's order. The field of that name is then the largest of them.

    Sizes of kinds of layer that the pattern does not have are kept but mean nothing.

    Raises:
        ConfigError: The pattern is illegal, a size is not positive, or the activation cannot be expressed in
            Megatron's flags.
    """

    pattern: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    ffn_hidden_size: int
    gated_linear_unit: bool = True
    activation: Literal["silu", "gelu", "squared_relu"] = "silu"
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    mamba_num_heads: int
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    zero_centered_norm: bool = False
    position_embedding_type: Literal["none", "rope"] = "none"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    rope_scaling_factor: float | None = None
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = True
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_router_topk: int = 2
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    layer_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = parse(self.pattern).units
        object.__setattr__(self, "pattern", units)
        object.__setattr__(self, "add_qkv_bias", self.add_qkv_bias or self.add_bias_linear)  # as Megatron does
        for name, absent in MIXTURE.items():
            if MOE not in units:
                object.__setattr__(self, name, absent)
        for entry in fields(self):
            value, least = getattr(self, entry.name), 1
            if entry.name == "moe_shared_expert_intermediate_size" or (entry.name in MIXTURE and MOE not in units):
                least = 0
            if entry.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{entry.name} must be a positive whole number", got=repr(value))
        if (self.gated_linear_unit, self.activation) not in _ACTIVATIONS:
            raise ConfigError(
                "this activation does not exist in Megatron's flags",
                got=f"{self.activation}, {'gated' if self.gated_linear_unit else 'not gated'}",
                legal=", ".join(f"{name} {'gated' if gated else 'not gated'}" for gated, name in _ACTIVATIONS),
            )
        for name, legal in (
            ("normalization", ("RMSNorm", "LayerNorm")), ("position_embedding_type", ("none", "rope")),
            ("moe_router_score_function", ("softmax", "sigmoid")),
        ):  # fmt: skip
            if getattr(self, name) not in legal:
                raise ConfigError(f"unknown {name}", got=getattr(self, name), legal=", ".join(legal))
        object.__setattr__(self, "layer_sizes", self._uneven_sizes(units))
        if MOE in units:
            self._check_mixture()

    def _check_mixture(self) -> None:
        softmax = self.moe_router_score_function == "softmax"
        if self.moe_router_topk > self.num_experts:
            raise ConfigError(
                "each token needs more experts than there are", got=f"moe_router_topk={self.moe_router_topk}",
                legal=f"1 to num_experts={self.num_experts}",
            )  # fmt: skip
        if softmax and self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise ConfigError("a softmax over one chosen expert is always 1", legal="--moe-router-pre-softmax")
        if softmax and self.moe_router_enable_expert_bias:
            raise ConfigError("expert biases go with sigmoids", legal="--moe-router-score-function sigmoid")
        if self.moe_shared_expert_intermediate_size and self.add_bias_linear:
            raise ConfigError("Megatron's shared experts have no biases", legal="--disable-bias-linear")

    def _uneven_sizes(self, units: str) -> dict[str, tuple[int, ...]]:
        """`layer_sizes` checked, without those that are equal after all; sets the fields to the largest."""
        uneven = {}
        for name, sizes in self.layer_sizes.items():
            if name not in PER_LAYER:
                raise ConfigError(f"{name!r} cannot differ from layer to layer", legal=", ".join(PER_LAYER))
            count = units.count(PER_LAYER[name])
            if len(sizes) != count or any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ConfigError(
                    f"{name} of each layer", got=",".join(map(str, sizes)), legal=f"{count} positive whole numbers"
                )
            if sizes:
                object.__setattr__(self, name, max(sizes))
            if len(set(sizes)) > 1:
                uneven[name] = tuple(sizes)
        return uneven

    def at(self, layer: int) -> "Architecture":
        """This model with the sizes of one of its sub-layers everywhere; itself if no sizes differ."""
        if not self.layer_sizes:
            return self
        unit = self.pattern[layer]
        place = self.pattern[:layer].count(unit)
        own = {name: sizes[place] for name, sizes in self.layer_sizes.items() if PER_LAYER[name] == unit}
        return replace(self, layer_sizes={}, **own)

    @property
    def layers(self) -> Pattern:
        """The parsed pattern."""
        return parse(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Channels of a Mamba-2 layer, over all heads."""
        return self.mamba_num_heads * self.mamba_head_dim

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
        divides("vocab_size", tp, "tensor parallel size")
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
        common = gcd(self.num_attention_heads, self.vocab_size)
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
            "hidden-size": self.hidden_size, "padded-vocab-size": self.vocab_size,
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
        flags += _ACTIVATIONS[self.gated_linear_unit, self.activation]
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
            "padded_vocab_size": self.vocab_size, "max_position_embeddings": self.max_position_embeddings,
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
        """From `to_dict`'s values.

        Raises:
            ConfigError: A field is unknown or missing.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"unknown field {name!r} of an architecture", legal=nearest(name, names))
        try:
            return cls(**values)
        except TypeError as error:  # a required field is missing
            raise ConfigError(f"incomplete architecture: {error}", legal=", ".join(names)) from None
