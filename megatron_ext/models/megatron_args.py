"""What Megatron's arguments say about the function of a model: those that `Architecture` carries, and those it cannot.

Every argument of Megatron's, and every field of its model configurations, is one of three kinds: it is `CARRIED`; it
changes what a model computes and nothing here could say so, so that it must be as in `UNSUPPORTED`; or it says how a
model is trained, run or stored. `tests/unit/models/test_megatron_args.py` lists the third kind and fails for an
argument of the installed Megatron that is none of the three.
"""

from argparse import Namespace
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import MOE

MAMBA_EXPAND = 2
# The fields of a mixture of experts, with the values they have where there is none; Megatron's names.
MIXTURE: dict[str, Any] = {
    "num_experts": 0, "moe_ffn_hidden_size": 0, "moe_shared_expert_intermediate_size": 0, "moe_router_topk": 2,
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
}  # fmt: skip
CARRIED = (
    "hybrid_layer_pattern", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type", "rotary_base",
    "rotary_percent", "use_rope_scaling", "rope_scaling_factor", "normalization", "layernorm_epsilon",
    "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "swiglu", "squared_relu",
    "untie_embeddings_and_output_weights", "padded_vocab_size", "vocab_size", "make_vocab_size_divisible_by",
    "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups", "ext_layer_sizes", "moe_layer_freq",
    *MIXTURE,
)  # fmt: skip
_OFF, _UNSET, _NONE = (False, None), (None,), (None, 0)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # attention
    "multi_latent_attention": _OFF, "experimental_attention_variant": _UNSET, "linear_attention_freq": _UNSET,
    "attention_output_gate": _OFF, "qk_l2_norm": _OFF, "softmax_type": ("vanilla", None), "softmax_scale": _UNSET,
    "window_size": _UNSET,
    # positions
    "rotary_interleaved": _OFF, "rotary_seq_len_interpolation_factor": (None, 1), "no_rope_freq": _UNSET,
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
FUNCTION = (*CARRIED, *UNSUPPORTED, *_MIXTURE_UNSUPPORTED, "moe_router_load_balancing_type", "spec")
"""Every argument that changes what a model computes."""


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
    for name, legal in unsupported.items():
        value = getattr(args, name, None)
        if value not in legal and value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} changes what the model computes, and is not supported", got=value,
                legal="a model without it" if None in legal else " or ".join(map(str, legal)),
            )  # fmt: skip
    spec = getattr(args, "spec", None)
    if spec and spec[0] != "local" and not str(spec[0]).startswith("megatron.core."):
        raise ConfigError("--spec: layers of your own are not supported", got=" ".join(map(str, spec)), legal="none")


def fields_of(args: Namespace) -> dict[str, Any]:
    """The fields of an `Architecture`, from Megatron's arguments before or after `validate_args`.

    The defaults it fills in are Megatron's own (`options/fields.py`: FFN and head width; `MambaMixer`: number of heads;
    `vocab_utils.py`: padding of the vocabulary).

    Raises:
        ConfigError: A required argument is missing or asks for something that `Architecture` cannot say.
    """
    if args.hybrid_layer_pattern is None:
        raise ConfigError("no model given", legal="--hybrid-layer-pattern or --preset")
    if "/" in args.hybrid_layer_pattern:
        raise ConfigError("multi-token prediction is not supported", got=args.hybrid_layer_pattern)
    check_supported(args)
    for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing", legal="a positive whole number")
    if args.position_embedding_type == "learned_absolute":
        raise ConfigError(
            "--position-embedding-type: learned positions are not supported",
            got="learned_absolute, Megatron's default", legal="none, rope",
        )  # fmt: skip
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.kv_channels is None and hidden % heads:
        raise ConfigError(f"hidden size {hidden} does not divide by {heads} heads", legal="give --kv-channels")
    ffn = args.ffn_hidden_size or (int((4 * hidden * 2 / 3) / 64) * 64 if args.swiglu else 4 * hidden)
    return {
        "pattern": args.hybrid_layer_pattern, "hidden_size": hidden, "padded_vocab_size": _padded_vocab_size(args),
        "max_position_embeddings": args.max_position_embeddings, "ffn_hidden_size": ffn,
        "gated_linear_unit": args.swiglu,
        "activation": "silu" if args.swiglu else "squared_relu" if args.squared_relu else "gelu",
        "num_attention_heads": heads,
        "num_query_groups": args.num_query_groups if args.group_query_attention else heads,
        "kv_channels": args.kv_channels or hidden // heads,
        "mamba_num_heads": args.mamba_num_heads or max(1, hidden * MAMBA_EXPAND // args.mamba_head_dim),
        "mamba_head_dim": args.mamba_head_dim, "mamba_state_dim": args.mamba_state_dim,
        "mamba_num_groups": args.mamba_num_groups, "normalization": args.normalization,
        "norm_epsilon": args.layernorm_epsilon, "zero_centered_norm": args.layernorm_zero_centered_gamma,
        "position_embedding_type": args.position_embedding_type, "rotary_base": args.rotary_base,
        "rotary_percent": args.rotary_percent,
        "rope_scaling_factor": args.rope_scaling_factor if args.use_rope_scaling else None,
        "add_bias_linear": args.add_bias_linear, "add_qkv_bias": args.add_qkv_bias,
        "qk_layernorm": getattr(args, "qk_layernorm", False),
        "untie_embeddings_and_output_weights": args.untie_embeddings_and_output_weights,
        "layer_sizes": _parse_layer_sizes(getattr(args, "ext_layer_sizes", None)),
        **(_mixture_of(args, ffn) if MOE in args.hybrid_layer_pattern else {}),
    }  # fmt: skip


def _mixture_of(args: Namespace, ffn_hidden_size: int) -> dict[str, Any]:
    """The fields of the mixture of experts."""
    given = {name: getattr(args, name, None) for name in MIXTURE}
    given["moe_ffn_hidden_size"] = given["moe_ffn_hidden_size"] or ffn_hidden_size  # as Megatron does
    return {name: MIXTURE[name] if value is None else value for name, value in given.items()}


def _parse_layer_sizes(text: str | None) -> dict[str, tuple[int, ...]]:
    """The inverse of `Architecture.layer_sizes_text`."""
    try:
        entries = [entry.split("=") for entry in (text or "").split()]
        return {name: tuple(int(size) for size in sizes.split(",")) for name, sizes in entries}
    except ValueError:
        raise ConfigError("--ext-layer-sizes", got=text, legal="ffn_hidden_size=96,80,96 mamba_num_heads=8,4") from None


def _padded_vocab_size(args: Namespace) -> int:
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    if args.vocab_size is None:
        raise ConfigError("the vocabulary size is not known", legal="--padded-vocab-size or --vocab-size")
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.vocab_size // multiple) * multiple
