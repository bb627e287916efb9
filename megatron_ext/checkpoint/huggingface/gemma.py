"""`GemmaForCausalLM`, `Gemma2ForCausalLM` and `Gemma3ForCausalLM` (text).

GELU in the gate, norms centred at zero, embeddings multiplied by the root of the hidden size; from Gemma 2 on norms
after sub-layers, windows in most layers and, in Gemma 2, bounded logits; in Gemma 3 norms on query and key, and another
RoPE base where there is a window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Nullable, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import number, whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED_MLP, Divides, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping
from megatron_ext.checkpoint.huggingface.qwen import QK_NORMS
from megatron_ext.checkpoint.huggingface.windows import FULL, SLIDING, Window, all_but_every
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

_NORMS = [
    ParamMapping("*", "post_attention_layernorm.weight", "post_norm.weight"),
    ParamMapping("-", "post_feedforward_layernorm.weight", "post_norm.weight"),
    ParamMapping("-", "pre_feedforward_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
]
_MLP = [mapping for mapping in GATED_MLP if mapping.megatron != "mlp.linear_fc1.layer_norm_weight"]


@dataclass(frozen=True)
class EmbeddingScale:
    """Embeddings are multiplied by the root of the hidden size, unless a class of ours has an entry of its own."""

    own: bool = False

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        usual = whole(config, "hidden_size") ** 0.5
        return {"embedding_multiplier": number(config, "embedding_multiplier", usual) if self.own else usual}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry, where there is one."""
        if self.own:
            return {"embedding_multiplier": arch.embedding_multiplier}
        if arch.embedding_multiplier != arch.hidden_size**0.5:
            raise CheckpointError(
                "the class multiplies embeddings by the root of the hidden size, the model by another number",
                got=arch.embedding_multiplier, legal=f"{arch.hidden_size**0.5}, or a Pruned class of ours",
            )  # fmt: skip
        return {}


class _QueryScale:
    """Attention's scale is the inverse root of `query_pre_attn_scalar`."""

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        return {"softmax_scale": whole(config, "query_pre_attn_scalar", 256) ** -0.5}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        scale = arch.kv_channels**-0.5 if arch.softmax_scale is None else arch.softmax_scale
        return {"query_pre_attn_scalar": round(scale**-2)}


class _TwoBases:
    """Rotary positions with a base, and scaling, of layers that see everything, and a base of those with a window."""

    FULL_ROPE = Rope(base=1e6)

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        nested = config.get("rope_parameters") or {}
        if not isinstance(nested, Mapping) or not all(isinstance(value, Mapping) for value in nested.values()):
            raise CheckpointError("config.json: rotary positions are not those of two kinds of layer", got=nested)
        local = dict(nested.get(SLIDING) or {})
        base = number(local, "rope_theta", config.get("rope_local_base_freq") or 1e4)
        if base != int(base) or local.get("rope_type", "default") != "default":
            raise CheckpointError(f"config.json: the rotary positions of {SLIDING} are not supported", got=local)
        full = dict(nested.get(FULL) or {}) | dict(config.get("rope_scaling") or {})
        own = {name: value for name, value in config.items() if name != "rope_scaling"}
        return self.FULL_ROPE.read(own | {"rope_parameters": full}) | {"local_rotary_base": int(base)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries, in the form that `like` has."""
        local = float(arch.local_rotary_base or arch.rotary_base)
        if "rope_parameters" not in like:
            return self.FULL_ROPE.write(arch, like) | {"rope_local_base_freq": local}
        full = self.FULL_ROPE.write(arch, {"rope_parameters": {}})["rope_parameters"]
        return {"rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}}


_GATE = Fixed(
    activation="gelu_tanh", gated_linear_unit=True, normalization="RMSNorm", zero_centered_norm=True,
    add_bias_linear=False,
)  # fmt: skip
_CONFIG: list[Any] = [
    *sizes(8192), Renamed("head_dim", "kv_channels", 256), Renamed("rms_norm_eps", "norm_epsilon", 1e-6), _GATE,
    Tied(True), Required("attention_bias", False), Required("use_bidirectional_attention", None, False),
    EmbeddingScale(),
]  # fmt: skip
_POST_NORMED: list[Any] = [
    *_CONFIG, Required("hidden_activation", "gelu_pytorch_tanh"), Fixed(post_norm=True), _QueryScale(), Divides(),
]  # fmt: skip

GEMMA = Family(
    "GemmaForCausalLM", "gemma", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *GATED_MLP, *FINAL_NORM],
    [*_CONFIG, Required("hidden_act", "gelu_pytorch_tanh", "gelu"),
     Required("hidden_activation", None, "gelu_pytorch_tanh"), Rope()],
)  # fmt: skip
GEMMA2 = Family(
    "Gemma2ForCausalLM", "gemma2", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *_NORMS, *_MLP, *FINAL_NORM],
    [*_POST_NORMED, Renamed("num_key_value_heads", "num_query_groups", 4), Rope(),
     Window(None, kinds=all_but_every(2), by_layer=True),
     Nullable("attn_logit_softcapping", "attention_softcap", 50.0),
     Nullable("final_logit_softcapping", "logits_softcap", 30.0)],
)  # fmt: skip
GEMMA3 = Family(
    "Gemma3ForCausalLM", "gemma3_text", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QK_NORMS, *_NORMS, *_MLP, *FINAL_NORM],
    [*_POST_NORMED, Renamed("num_key_value_heads", "num_query_groups", 4),
     Renamed("max_position_embeddings", "max_position_embeddings", 131_072), _TwoBases(),
     Window(None, kinds=all_but_every(6), by_layer=True), Fixed(qk_layernorm=True),
     Required("attn_logit_softcapping", None), Nullable("final_logit_softcapping", "logits_softcap", None)],
)  # fmt: skip
