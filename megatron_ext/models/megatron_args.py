"""Megatron's arguments and an `Architecture`: one table, read in both directions, and what it cannot say.

Every argument of Megatron's, and every field of its model configurations, is one of three kinds: it is in `TABLE`; it
changes what a model computes and nothing here could say so, so that it must be as in `UNSUPPORTED`; or it says how a
model is trained, run or stored. `tests/unit/models/test_megatron_args.py` lists the third kind and fails for an
argument of the installed Megatron that is none of the three.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.models import rope_scaling
from megatron_ext.models.argument_mappings import Argument, ArgumentMapping, Count, Renamed
from megatron_ext.models.pattern import MOE

MAMBA_EXPAND = 2
_HIDDEN = Argument("hidden_size", required=True)
_HEADS = Argument("num_attention_heads", required=True)
_SWIGLU = Argument("swiglu", False)
_HEAD_DIM = Argument("mamba_head_dim", 64)


class _Pattern:
    arguments = (Argument("hybrid_layer_pattern", kind=str, required=True),)

    def read(self, args: Namespace) -> str:
        if args.hybrid_layer_pattern is None:
            raise ConfigError("no model given", legal="--hybrid-layer-pattern or --preset")
        if "/" in args.hybrid_layer_pattern:
            raise ConfigError("multi-token prediction is not supported", got=args.hybrid_layer_pattern)
        return args.hybrid_layer_pattern

    def write(self, value: str) -> dict[str, Any]:
        return {"hybrid_layer_pattern": value, "num_layers": len(value)}


class _PaddedVocabSize:
    """Rows of the embedding; what the tokenizer needs is padded to a multiple (`vocab_utils.py`)."""

    arguments = (Argument("padded_vocab_size"),)

    def read(self, args: Namespace) -> int:
        if args.padded_vocab_size is not None:
            return args.padded_vocab_size
        if args.vocab_size is None:
            raise ConfigError("the vocabulary size is not known", legal="--padded-vocab-size or --vocab-size")
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        return -(-args.vocab_size // multiple) * multiple

    def write(self, value: int) -> dict[str, Any]:
        return {"padded_vocab_size": value}


class _Activation:
    arguments = (
        Argument("squared_relu", False),
        Argument("ext_geglu", False, help="the gate of --swiglu is GELU, in its form with tanh"),
    )

    def read(self, args: Namespace) -> str:
        squared, tanh = (argument.of(args) for argument in self.arguments)
        if _SWIGLU.of(args):
            return "gelu_tanh" if tanh else "silu"
        if tanh:
            raise ConfigError("--ext-geglu is of a gate", legal="--swiglu --ext-geglu")
        return "squared_relu" if squared else "gelu"

    def write(self, value: str) -> dict[str, Any]:
        return {"squared_relu": value == "squared_relu", "quick_geglu": False, "ext_geglu": value == "gelu_tanh"}


class _QueryGroups:
    arguments = (Argument("group_query_attention", False), Argument("num_query_groups", 1))

    def read(self, args: Namespace) -> int:
        grouped, groups = (argument.of(args) for argument in self.arguments)
        return groups if grouped else _HEADS.of(args)

    def write(self, value: int) -> dict[str, Any]:
        return {"group_query_attention": True, "num_query_groups": value}


class _Positions:
    arguments = (Argument("position_embedding_type", "learned_absolute"),)

    def read(self, args: Namespace) -> str:
        value = self.arguments[0].of(args)
        if value == "learned_absolute":
            raise ConfigError(
                "--position-embedding-type: learned positions are not supported",
                got="learned_absolute, Megatron's default", legal="none, rope",
            )  # fmt: skip
        return value

    def write(self, value: str) -> dict[str, Any]:
        return {"position_embedding_type": value, "add_position_embedding": True}


class _RopeScaling:
    arguments = (Argument("use_rope_scaling", False), Argument("rope_scaling_factor", 8.0))

    def read(self, args: Namespace) -> float | None:
        scaled, factor = (argument.of(args) for argument in self.arguments)
        return factor if scaled else None

    def write(self, value: float | None) -> dict[str, Any]:
        return {"use_rope_scaling": value is not None, "rope_scaling_factor": value or 8.0}


class _LayerSizes:
    """`ffn_hidden_size=96,80 mamba_num_heads=8,4`, a flag of ours."""

    arguments = (
        Argument(
            "ext_layer_sizes", "", kind=str,
            help="sizes that differ from layer to layer, such as 'ffn_hidden_size=96,80 mamba_num_heads=8,4'",
        ),
    )  # fmt: skip

    def read(self, args: Namespace) -> dict[str, tuple[int, ...]]:
        text = self.arguments[0].of(args)
        try:
            entries = [entry.split("=") for entry in (text or "").split()]
            return {name: tuple(int(size) for size in sizes.split(",")) for name, sizes in entries}
        except ValueError:
            legal = "ffn_hidden_size=96,80,96 mamba_num_heads=8,4"
            raise ConfigError("--ext-layer-sizes", got=text, legal=legal) from None

    def write(self, value: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"ext_layer_sizes": " ".join(f"{name}={','.join(map(str, sizes))}" for name, sizes in value.items())}


class _OtherRopeScaling:
    """`rope_type=yarn factor=4.0 ...`, a flag of ours."""

    arguments = (
        Argument(
            "ext_rope_scaling", "", kind=str,
            help="scaling of rotary positions in transformers' words, such as 'rope_type=linear factor=4.0'",
        ),
    )  # fmt: skip

    def read(self, args: Namespace) -> dict[str, Any]:
        return rope_scaling.parse(self.arguments[0].of(args))

    def write(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {"ext_rope_scaling": rope_scaling.text(value)}


class _Windows:
    """`1024,1024,0`, a flag of ours."""

    arguments = (
        Argument(
            "ext_attention_windows", "", kind=str,
            help="how many tokens each attention layer sees, 0 for all, such as '1024,1024,0'",
        ),
    )  # fmt: skip

    def read(self, args: Namespace) -> tuple[int, ...]:
        text = self.arguments[0].of(args)
        try:
            return tuple(int(word) for word in text.split(",")) if text else ()
        except ValueError:
            raise ConfigError("--ext-attention-windows", got=text, legal="1024,1024,0") from None

    def write(self, value: Sequence[int]) -> dict[str, Any]:
        return {"ext_attention_windows": ",".join(map(str, value))}


def _ffn_hidden_size(args: Namespace) -> int:
    own = getattr(args, "ffn_hidden_size", None)
    return own or (int((4 * args.hidden_size * 2 / 3) / 64) * 64 if _SWIGLU.of(args) else 4 * args.hidden_size)


def _kv_channels(args: Namespace) -> int:
    hidden, heads = _HIDDEN.of(args), _HEADS.of(args)
    if hidden % heads:
        raise ConfigError(f"hidden size {hidden} does not divide by {heads} heads", legal="give --kv-channels")
    return hidden // heads


def _mamba_num_heads(args: Namespace) -> int:
    return max(1, _HIDDEN.of(args) * MAMBA_EXPAND // _HEAD_DIM.of(args))


def _same(name: str, default: Any = None, **details: Any) -> Renamed:
    return Renamed(Argument(name, default, **details))


def _ours(name: str, default: Any, help: str, kind: type | None = None) -> Renamed:
    """A flag of ours, for what Megatron's parser has no word for."""
    return Renamed(Argument(f"ext_{name}", default, kind=kind, help=help))


_LINEAR_RANK = "rank of the linear sub-layers (L in the pattern): x + up (down x) + bias; x + bias if it is not given"

# What is filled in is Megatron's own (`options/fields.py`; `MambaMixer` for its heads).
TABLE: dict[str, ArgumentMapping] = {
    "pattern": _Pattern(),
    "hidden_size": Renamed(_HIDDEN),
    "padded_vocab_size": _PaddedVocabSize(),
    "max_position_embeddings": _same("max_position_embeddings", required=True),
    "ffn_hidden_size": Renamed(Argument("ffn_hidden_size"), _ffn_hidden_size),
    "gated_linear_unit": Renamed(_SWIGLU),
    "activation": _Activation(),
    "num_attention_heads": Renamed(_HEADS),
    "num_query_groups": _QueryGroups(),
    "kv_channels": Renamed(Argument("kv_channels"), _kv_channels),
    "mamba_num_heads": Renamed(Argument("mamba_num_heads"), _mamba_num_heads),
    "mamba_head_dim": Renamed(_HEAD_DIM),
    "mamba_state_dim": _same("mamba_state_dim", 128),
    "mamba_num_groups": _same("mamba_num_groups", 8),
    "normalization": _same("normalization", "LayerNorm"),
    "norm_epsilon": _same("layernorm_epsilon", 1e-5, flag="--norm-epsilon"),
    "zero_centered_norm": _same("layernorm_zero_centered_gamma", False, flag="--apply-layernorm-1p"),
    "position_embedding_type": _Positions(),
    "rotary_base": _same("rotary_base", 10000),
    "rotary_percent": _same("rotary_percent", 1.0),
    "rotary_interleaved": _same("rotary_interleaved", False),
    "rope_scaling_factor": _RopeScaling(),
    "rope_scaling": _OtherRopeScaling(),
    "local_rotary_base": _ours("local_rotary_base", None, "the RoPE base of attention layers with a window", int),
    "attention_windows": _Windows(),
    "attention_softcap": _ours("attention_softcap", None, "c of c tanh(x / c), of attention's logits x", float),
    "logits_softcap": _ours("logits_softcap", None, "c of c tanh(x / c), of the model's logits x", float),
    "softmax_scale": _ours("softmax_scale", None, "what attention's logits are multiplied by", float),
    "pre_norm": Renamed(Argument("ext_pre_norm", True, "--ext-no-pre-norm", help="no norm before each sub-layer")),
    "post_norm": _ours("post_norm", False, "a norm of what each sub-layer adds"),
    "embedding_multiplier": _ours("embedding_multiplier", 1.0, "what embedded tokens are multiplied by"),
    "residual_multiplier": _ours("residual_multiplier", 1.0, "what a sub-layer's output is multiplied by"),
    "logits_scaling": _ours("logits_scaling", 1.0, "what logits are divided by"),
    "add_bias_linear": _same("add_bias_linear", True, flag="--disable-bias-linear"),
    "add_qkv_bias": _same("add_qkv_bias", False),
    "qk_layernorm": _same("qk_layernorm", False),
    "qk_layernorm_of_all_heads": _ours(
        "qk_layernorm_of_all_heads", False, "RMSNorms over all query heads together, and over all key heads"
    ),
    "untie_embeddings_and_output_weights": _same("untie_embeddings_and_output_weights", False),
    "num_experts": Count(Argument("num_experts")),
    "moe_ffn_hidden_size": Count(Argument("moe_ffn_hidden_size"), _ffn_hidden_size),
    "moe_shared_expert_intermediate_size": Count(Argument("moe_shared_expert_intermediate_size")),
    "moe_router_topk": _same("moe_router_topk", 2),
    "moe_router_score_function": _same("moe_router_score_function", "softmax"),
    "moe_router_pre_softmax": _same("moe_router_pre_softmax", False),
    "moe_router_topk_scaling_factor": _same("moe_router_topk_scaling_factor", kind=float),
    "moe_router_enable_expert_bias": _same("moe_router_enable_expert_bias", False),
    "linear_rank": Count(Argument("ext_linear_rank", help=_LINEAR_RANK)),
    "layer_sizes": _LayerSizes(),
}
"""How Megatron's arguments say each field of an `Architecture`."""


def fields_of(args: Namespace, names: Iterable[str] = TABLE) -> dict[str, Any]:
    """These fields of a model, from Megatron's arguments before or after `validate_args`.

    Raises:
        ConfigError: A required argument is missing or asks for something that `Architecture` cannot say.
    """
    TABLE["pattern"].read(args)  # without which nothing else matters
    check_supported(args)
    return {name: TABLE[name].read(args) for name in names}


def arguments_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for the fields of a model, as it would have parsed them: the inverse of `fields_of`."""
    return {name: value for field, own in values.items() for name, value in TABLE[field].write(own).items()}


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The command line that is parsed to `arguments_of` these fields."""
    parsed = arguments_of(values)
    said = (argument for field in values for argument in TABLE[field].arguments)
    return [word for argument in said for word in argument.to_flags(parsed[argument.name])]


_OFF, _UNSET, _NONE = (False, None), (None,), (None, 0)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # attention
    "multi_latent_attention": _OFF, "experimental_attention_variant": _UNSET, "linear_attention_freq": _UNSET,
    "attention_output_gate": _OFF, "qk_l2_norm": _OFF, "softmax_type": ("vanilla", None), "softmax_scale": _UNSET,
    "window_size": _UNSET,
    # positions
    "rotary_seq_len_interpolation_factor": (None, 1), "no_rope_freq": _UNSET,
    "rope_type": ("rope", None), "mrope_section": _UNSET,
    # activations
    "quick_geglu": _OFF, "openai_gelu": _OFF, "glu_linear_offset": _NONE, "activation_func_clamp_value": _UNSET,
    # layers
    "apply_residual_connection_post_layernorm": _OFF, "mtp_num_layers": _NONE, "mtp_hybrid_override_pattern": _UNSET,
    "heterogeneous_layers_config_path": _UNSET, "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_block_specs": _OFF, "hybrid_attention_ratio": _NONE, "hybrid_mlp_ratio": _NONE,
    # maximal update parametrisation: factors on embeddings, attention and logits
    "use_mup": _OFF,
}  # fmt: skip
_MIXTURE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "moe_latent_size": _NONE, "moe_shared_expert_gate": _OFF, "moe_router_num_groups": _NONE,
    "moe_router_group_topk": _NONE, "moe_router_topk_limited_devices": _UNSET, "moe_router_force_load_balancing": _OFF,
    "moe_router_force_biased": _UNSET, "moe_expert_capacity_factor": _UNSET, "moe_expert_rank_capacity_factor": _UNSET,
    "moe_token_dropping": _OFF, "moe_input_jitter_eps": _NONE, "moe_apply_probs_on_input": _OFF,
    "moe_mlp_glu_interleave_size": _NONE, "moe_shared_expert_glu_interleave_size": _NONE,
}  # fmt: skip
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", None)
# Beside those of the table: what the pattern says again, and what the padded vocabulary is made of.
REPEATED = ("num_layers", "moe_layer_freq", "vocab_size", "make_vocab_size_divisible_by")


def arguments() -> list[Argument]:
    """All that the table reads from a command line."""
    return [argument for mapping in TABLE.values() for argument in mapping.arguments]


def own_arguments() -> list[Argument]:
    """Those that Megatron's parser does not know."""
    return [argument for argument in arguments() if argument.help]


def functional_arguments() -> list[str]:
    """The name of every argument that changes what a model computes."""
    carried = [argument.name for argument in arguments()]
    refused = [name for name in (*UNSUPPORTED, *_MIXTURE_UNSUPPORTED) if name not in carried]
    return [*carried, *REPEATED, *refused, "moe_router_load_balancing_type", "spec"]


def check_supported(args: Namespace) -> None:
    """Check that nothing changes the function of a model but what `Architecture` carries.

    Args:
        args: Megatron's, parsed or saved with a checkpoint; arguments that it does not have are as by default.

    Raises:
        ConfigError: Names the flag.
    """
    unsupported = UNSUPPORTED
    if MOE in (getattr(args, "hybrid_layer_pattern", None) or ""):
        unsupported = UNSUPPORTED | _MIXTURE_UNSUPPORTED
        balancing = getattr(args, "moe_router_load_balancing_type", None)
        for kind in balancing if isinstance(balancing, list) else [balancing]:
            if kind not in _BALANCING:
                raise ConfigError("this router is not supported", got=kind, legal="aux_loss, seq_aux_loss, none")
    carried = {argument.name for argument in arguments()}
    for name, legal in unsupported.items():
        value = None if name in carried else getattr(args, name, None)
        if value not in legal and value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} changes what the model computes, and is not supported", got=value,
                legal="a model without it" if None in legal else " or ".join(map(str, legal)),
            )  # fmt: skip
    spec = getattr(args, "spec", None)
    if spec and spec[0] != "local" and not str(spec[0]).startswith("megatron.core."):
        raise ConfigError("--spec: layers of your own are not supported", got=" ".join(map(str, spec)), legal="none")
