"""`BambaForCausalLM`: Bamba, a hybrid of Mamba-2 and attention layers, an MLP after each of them."""

from dataclasses import replace
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Layers, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, GATED, sizes
from megatron_ext.checkpoint.huggingface.mamba2 import MIXER, NoLimit
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, gated_mlp_mapping
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import CONV_KERNEL, Architecture
from megatron_ext.models.pattern import ATTENTION as ATTENTION_KIND
from megatron_ext.models.pattern import MAMBA

HALF = 0.5
_MIXER = [
    replace(
        mapping,
        hf="input_layernorm.weight" if mapping.hf == "norm.weight" else mapping.hf.replace("mixer.", "mamba."),
    )
    for mapping in MIXER
]
_MLP = [
    ParamMapping("-", "pre_ff_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    *gated_mlp_mapping("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight", "mlp.linear_fc1.weight"),
    ParamMapping("-", "feed_forward.down_proj.weight", "mlp.linear_fc2.weight"),
]


class _Mixers:
    """Which layers have attention; Mamba-2 the others."""

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern."""
        chosen = config.get("attn_layer_indices") or []
        if not isinstance(chosen, list) or not all(type(layer) is int for layer in chosen):
            raise CheckpointError("config.json: 'attn_layer_indices' is no list of layers", got=repr(chosen))
        layers = range(whole(config, "num_hidden_layers", 32))
        return {"pattern": "".join((ATTENTION_KIND if layer in chosen else MAMBA) + "-" for layer in layers)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        mixers = arch.pattern[::2]
        chosen = [layer for layer, kind in enumerate(mixers) if kind == ATTENTION_KIND]
        if not chosen:
            raise CheckpointError("BambaForCausalLM needs attention to run with a cache", got=arch.pattern)
        return {"num_hidden_layers": len(mixers), "attn_layer_indices": chosen}


class _Heads:
    """Channels of a Mamba-2 head; together they are a whole multiple of the hidden size."""

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        heads = whole(config, "mamba_n_heads", 128)
        inner = whole(config, "mamba_expand", 2) * whole(config, "hidden_size", 4096)
        given = config.get("mamba_d_head", "auto")
        channels = inner // heads if given in ("auto", None) else whole(config, "mamba_d_head")
        if channels * heads != inner:
            raise CheckpointError(
                "config.json: mamba_expand * hidden_size is not mamba_n_heads * mamba_d_head",
                got=f"{inner} and {channels * heads}",
            )
        return {"mamba_head_dim": channels}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        if arch.mamba_inner_size % arch.hidden_size:
            raise CheckpointError(
                "BambaForCausalLM needs an inner width that is a whole multiple of the hidden size",
                got=f"{arch.mamba_inner_size} (heads * channels) and {arch.hidden_size}",
                legal="HybridForCausalLM has no such condition: --hf-class HybridForCausalLM",
            )
        return {"mamba_d_head": arch.mamba_head_dim, "mamba_expand": arch.mamba_inner_size // arch.hidden_size}


class _HalfRotated:
    """Half of each head's channels are rotated unless `rope_parameters` says otherwise: the older entry is ignored."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing; refuses an entry that transformers ignores."""
        share = config.get("partial_rotary_factor", HALF)
        if "rope_parameters" not in config and share != HALF:
            raise CheckpointError(
                "config.json: transformers ignores 'partial_rotary_factor' outside of 'rope_parameters'", got=share,
                legal=HALF,
            )  # fmt: skip
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing; refuses what only `rope_parameters` can say where they are not written."""
        if "rope_parameters" not in like and arch.rotary_percent != HALF:
            raise CheckpointError(
                "BambaForCausalLM rotates half of each head", got=f"a share of {arch.rotary_percent}",
                legal="HybridForCausalLM rotates any: --hf-class HybridForCausalLM",
            )  # fmt: skip
        return {}


BAMBA = Family(
    "BambaForCausalLM", "bamba", "model.layers.{}", ("M*", "-"),
    [*EMBEDDINGS, *_MIXER, *ATTENTION, *_MLP,
     ParamMapping("", "model.final_layernorm.weight", "decoder.final_norm.weight")],
    [*(mapping for mapping in sizes(262_144, 8) if not isinstance(mapping, Layers)), _Mixers(), *GATED,
     Renamed("rms_norm_eps", "norm_epsilon", 1e-5),
     Required("rms_norm_eps", 1e-5),  # Megatron's norm inside the mixer has no other
     Rope(HALF, partial=True), _HalfRotated(), Tied(), Renamed("mamba_n_heads", "mamba_num_heads", 128), _Heads(),
     Renamed("mamba_n_groups", "mamba_num_groups", 1), Renamed("mamba_d_state", "mamba_state_dim", 256),
     Required("mamba_d_conv", CONV_KERNEL), Required("mamba_conv_bias", True), Required("mamba_proj_bias", False),
     Required("attention_bias", False), Required("mlp_bias", False), NoLimit(), Fixed(add_bias_linear=False)],
)  # fmt: skip
