"""The sizes and kinds that make a model, checked for themselves: what the axes of its tensors are computed from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any, Literal, Self

from megatron_ext.errors import ConfigError
from megatron_ext.models import rope_scaling
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE, Pattern, parse

# Megatron's flags cannot say any other combination of gating and activation.
ACTIVATIONS = ((True, "silu"), (True, "gelu_tanh"), (False, "gelu"), (False, "squared_relu"))
# Sizes that may differ from layer to layer, and the kind of layer that has them.
PER_LAYER = {"ffn_hidden_size": MLP, "mamba_num_heads": MAMBA}
_MAYBE_ZERO = ("moe_shared_expert_intermediate_size", "linear_rank")
_MULTIPLIERS = (
    "softmax_scale", "attention_softcap", "logits_softcap", "embedding_multiplier", "residual_multiplier",
    "logits_scaling",
)  # fmt: skip
_MIXTURE = ("num_experts", "moe_")  # what the fields of a mixture of experts begin with


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """One `HybridModel`, whatever its family. All sizes are global, before any parallel split.

    Attributes:
        pattern: Sub-layers, one character each (see `megatron_ext.models.pattern`). Pipeline borders are dropped:
            they belong to a run, not to a model.
        padded_vocab_size: Rows of the embedding: Megatron's word for the tokenizer's `vocab_size` and padding.
        num_query_groups: Key/value heads; `num_attention_heads` for plain multi-head attention.
        kv_channels: Channels per attention head.
        mamba_num_heads: Heads of a Mamba-2 layer; its inner width is `mamba_num_heads * mamba_head_dim`.
        zero_centered_norm: Norm weights are stored minus one (Megatron's `--apply-layernorm-1p`).
        qk_layernorm: Norms on the channels of each query and key head (Qwen3).
        qk_layernorm_of_all_heads: Norms on all query heads together, and on all key heads (OLMo 2).
        rotary_interleaved: Neighbouring channels turn together, not one of each half of a head.
        rope_scaling_factor: Llama 3.1's frequency scaling, `None` for plain RoPE.
        rope_scaling: Any other scaling, see `rope_scaling.py`; empty for none.
        local_rotary_base: The base, unscaled, of attention layers with a window; `None` for that of all.
        softmax_scale: What attention's logits are multiplied by, `None` for the inverse root of `kv_channels`.
        attention_windows: How many tokens each attention layer sees, with the one that asks; 0 for all before it. One
            for each in the pattern's order, or none at all.
        attention_softcap: c of c tanh(x / c), through which attention's logits x go before the softmax.
        logits_softcap: The same of the model's logits.
        pre_norm: A norm before each sub-layer, of the residual stream.
        post_norm: A norm after each sub-layer, of what is added to the residual stream.
        embedding_multiplier: What embedded tokens are multiplied by.
        residual_multiplier: What each sub-layer's output is multiplied by before it is added.
        logits_scaling: What logits are divided by.
        num_experts: Experts of a mixture, of which each token runs through `moe_router_topk`, and all tokens through
            the shared expert; 0 (as the other sizes) where the pattern has no mixture of experts.
        moe_ffn_hidden_size: Neurons of one expert.
        moe_shared_expert_intermediate_size: Neurons of the shared expert, 0 for none.
        moe_router_score_function: How router logits become probabilities: a softmax over the chosen experts (over all
            of them if `moe_router_pre_softmax`), or sigmoids divided by the sum of the chosen ones.
        moe_router_topk_scaling_factor: What the probabilities are multiplied by, `None` for nothing.
        moe_router_enable_expert_bias: A bias for each expert that only counts when experts are chosen.
        linear_rank: Of the linear sub-layers: x + up (down x) + bias; 0 for x + bias.
        layer_sizes: Sizes that differ from layer to layer: for `ffn_hidden_size` or `mamba_num_heads`, one for each
            layer of the kind, in the pattern's order. The field of that name is then the largest of them.

    Sizes of kinds of layer that the pattern does not have are kept but mean nothing.

    Raises:
        ConfigError: The pattern is illegal, a size is not positive, or the activation cannot be expressed in
            Megatron's flags.
    """

    pattern: str
    hidden_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    ffn_hidden_size: int
    gated_linear_unit: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "squared_relu"] = "silu"
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
    rotary_interleaved: bool = False
    rope_scaling_factor: float | None = None
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    local_rotary_base: int | None = None
    softmax_scale: float | None = None
    attention_windows: tuple[int, ...] = ()
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    pre_norm: bool = True
    post_norm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    qk_layernorm_of_all_heads: bool = False
    untie_embeddings_and_output_weights: bool = True
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_router_topk: int = 2
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    linear_rank: int = 0
    layer_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = parse(self.pattern).units
        object.__setattr__(self, "pattern", units)
        object.__setattr__(self, "add_qkv_bias", self.add_qkv_bias or self.add_bias_linear)  # as Megatron does
        for entry in fields(self):
            absent = entry.name.startswith(_MIXTURE) and MOE not in units
            absent = absent or (entry.name == "linear_rank" and LINEAR not in units)
            if absent:
                object.__setattr__(self, entry.name, entry.default)
            value = getattr(self, entry.name)
            least = 0 if absent or entry.name in _MAYBE_ZERO else 1
            if entry.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{entry.name} must be a positive whole number", got=repr(value))
        if (self.gated_linear_unit, self.activation) not in ACTIVATIONS:
            raise ConfigError(
                "this activation does not exist in Megatron's flags",
                got=f"{self.activation}, {'gated' if self.gated_linear_unit else 'not gated'}",
                legal=", ".join(f"{name} {'gated' if gated else 'not gated'}" for gated, name in ACTIVATIONS),
            )
        for name, legal in (
            ("normalization", ("RMSNorm", "LayerNorm")), ("position_embedding_type", ("none", "rope")),
            ("moe_router_score_function", ("softmax", "sigmoid")),
        ):  # fmt: skip
            if getattr(self, name) not in legal:
                raise ConfigError(f"unknown {name}", got=getattr(self, name), legal=", ".join(legal))
        object.__setattr__(self, "layer_sizes", self._uneven_sizes(units))
        object.__setattr__(self, "rope_scaling", rope_scaling.checked(self.rope_scaling))
        object.__setattr__(self, "attention_windows", self._windows(units))
        self._check_multipliers()
        if MOE in units:
            self._check_mixture()

    def _windows(self, units: str) -> tuple[int, ...]:
        """`attention_windows` checked; empty where no layer has one."""
        windows, count = tuple(self.attention_windows), units.count(ATTENTION)
        if not any(windows):
            return ()
        if len(windows) != count or any(type(window) is not int or window < 0 for window in windows):
            got = ",".join(map(str, windows))
            raise ConfigError("attention_windows", got=got, legal=f"{count} whole numbers, 0 for no window")
        return windows

    def _check_multipliers(self) -> None:
        if self.rope_scaling and self.rope_scaling_factor is not None:
            raise ConfigError("two scalings of rotary positions", got="--use-rope-scaling and --ext-rope-scaling")
        for name in _MULTIPLIERS:
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be above 0", got=value)
        if self.qk_layernorm_of_all_heads and (self.qk_layernorm or self.normalization != "RMSNorm"):
            raise ConfigError("norms over all heads are RMSNorms, and no others are beside them")
        if not self.pre_norm and not self.post_norm:
            raise ConfigError("a model without norms", got="no pre_norm, no post_norm", legal="--ext-post-norm")
        if not self.pre_norm and MOE in self.pattern:
            raise ConfigError("experts without a norm before them are not supported", got=self.pattern)

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

    def at(self, layer: int) -> Self:
        """This model with the sizes of one of its sub-layers everywhere; itself if no sizes differ."""
        if not self.layer_sizes:
            return self
        unit = self.pattern[layer]
        place = self.pattern[:layer].count(unit)
        own = {name: sizes[place] for name, sizes in self.layer_sizes.items() if PER_LAYER[name] == unit}
        return replace(self, layer_sizes={}, **own)

    def window(self, layer: int) -> int:
        """Tokens that an attention layer sees, with the one that asks; 0 for all before it."""
        return self.attention_windows[self.pattern[:layer].count(ATTENTION)] if self.attention_windows else 0

    def windows_of(self, units: Iterable[int]) -> tuple[int, ...]:
        """`attention_windows` of a model with these sub-layers alone."""
        return tuple(self.window(unit) for unit in units if self.pattern[unit] == ATTENTION)

    @property
    def layers(self) -> Pattern:
        """The parsed pattern."""
        return parse(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Channels of a Mamba-2 layer, over all heads."""
        return self.mamba_num_heads * self.mamba_head_dim
