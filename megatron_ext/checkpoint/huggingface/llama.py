"""`LlamaForCausalLM`: Llama 1 to 3.3 and whatever was built like them."""

from collections.abc import Callable
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Biases, Fixed, Layers, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, gated_mlp_mapping, qkv_mapping, unpadded
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

EMBEDDINGS = [
    ParamMapping("", "model.embed_tokens.weight", "embedding.word_embeddings.weight", unpadded),
    ParamMapping("", "lm_head.weight", "output_layer.weight", unpadded),
]
FINAL_NORM = [ParamMapping("", "model.norm.weight", "decoder.final_norm.weight")]
ATTENTION = [
    ParamMapping("*", "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    *qkv_mapping("self_attn.{}_proj.weight", "self_attention.linear_qkv.weight"),
    ParamMapping("*", "self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
]
QKV_BIAS = qkv_mapping("self_attn.{}_proj.bias", "self_attention.linear_qkv.bias")
GATED_MLP = [
    ParamMapping("-", "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    *gated_mlp_mapping("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.linear_fc1.weight"),
    ParamMapping("-", "mlp.down_proj.weight", "mlp.linear_fc2.weight"),
]
BIASES = [
    ParamMapping("*", "self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
    *gated_mlp_mapping("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.linear_fc1.bias"),
    ParamMapping("-", "mlp.down_proj.bias", "mlp.linear_fc2.bias"),
]


def head_dim(config: Config) -> int:
    """Channels of a head where a configuration does not say."""
    return whole(config, "hidden_size") // whole(config, "num_attention_heads")


def groups(missing: int | None) -> Callable[[Config], int]:
    """Key/value heads where a configuration has null: as many as query heads; `missing` where it has no entry."""

    def heads(config: Config) -> int:
        if missing is not None and "num_key_value_heads" not in config:
            return missing
        return whole(config, "num_attention_heads")

    return heads


def sizes(context: int, missing_groups: int | None = None) -> list[Any]:
    """Entries that Llama and its relatives share.

    Args:
        context: `max_position_embeddings` where it is missing.
        missing_groups: `num_key_value_heads` where it is missing; as many as query heads by default.
    """
    return [
        Layers("*-"),
        Renamed("vocab_size", "padded_vocab_size"),
        Renamed("hidden_size", "hidden_size"),
        Renamed("intermediate_size", "ffn_hidden_size"),
        Renamed("num_attention_heads", "num_attention_heads"),
        Renamed("num_key_value_heads", "num_query_groups", groups(missing_groups)),
        Renamed("head_dim", "kv_channels", head_dim),
        Renamed("max_position_embeddings", "max_position_embeddings", context),
    ]


GATED = [
    Renamed("rms_norm_eps", "norm_epsilon", 1e-6),
    Required("hidden_act", "silu"),
    Fixed(activation="silu", gated_linear_unit=True, normalization="RMSNorm"),
]


class Divides:
    """transformers insists that the hidden size divides by the number of heads, whatever `head_dim` says."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing; refuses what transformers would."""
        self._check(whole(config, "hidden_size"), whole(config, "num_attention_heads"))
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing; refuses what transformers would."""
        self._check(arch.hidden_size, arch.num_attention_heads)
        return {}

    @staticmethod
    def _check(hidden: int, heads: int) -> None:
        if hidden % heads:
            raise CheckpointError(
                "the class needs a hidden size that divides by the number of heads",
                got=f"hidden_size={hidden}, num_attention_heads={heads}",
                legal="MistralForCausalLM has no such condition: --hf-class MistralForCausalLM",
            )


LLAMA = Family(
    "LlamaForCausalLM", "llama", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *GATED_MLP, *BIASES, *FINAL_NORM],
    [*sizes(2048), *GATED, Rope(), Tied(), Biases(("attention_bias", "mlp_bias")),
     Divides()],
)  # fmt: skip
