"""`NemotronHForCausalLM`: Nemotron-H and Nemotron 3, hybrids of Mamba-2, attention, MLPs and mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Renamed, Required, Tied
from megatron_ext.checkpoint.huggingface.entries import flag, number
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mamba2 import MIXER, MIXER_CONFIG, OUTER
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, qkv_mapping
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE

WORDS = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp", MOE: "moe"}
_UNITS = {word: unit for unit, word in WORDS.items()} | {"mamba": MAMBA, "attention": ATTENTION}

ATTENTION_ROWS = [
    ParamMapping("*", "norm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    *qkv_mapping("mixer.{}_proj.weight", "self_attention.linear_qkv.weight"),
    ParamMapping("*", "mixer.o_proj.weight", "self_attention.linear_proj.weight"),
]
_MLP = [
    ParamMapping("-", "norm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ParamMapping("-", "mixer.up_proj.weight", "mlp.linear_fc1.weight"),
    ParamMapping("-", "mixer.down_proj.weight", "mlp.linear_fc2.weight"),
]
EXPERTS = [
    ParamMapping("E", "norm.weight", "pre_mlp_layernorm.weight"),
    ParamMapping("E", "mixer.gate.weight", "mlp.router.weight"),
    ParamMapping("E", "mixer.gate.e_score_correction_bias", "mlp.router.expert_bias"),
    ParamMapping("E", "mixer.experts.{expert}.up_proj.weight", "mlp.experts.experts.linear_fc1.weight"),
    ParamMapping("E", "mixer.experts.{expert}.down_proj.weight", "mlp.experts.experts.linear_fc2.weight"),
    ParamMapping("E", "mixer.shared_experts.up_proj.weight", "mlp.shared_experts.linear_fc1.weight"),
    ParamMapping("E", "mixer.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight"),
]


def _head_dim(config: Config) -> int:
    """Channels of an attention head, under the name that the first of these models gave them."""
    return config.get("attention_head_dim", 128)


class LayerKinds:
    """The layer pattern: a list in transformers' own configuration, a string in those that came with their code.

    Args:
        words: What our kinds of sub-layers are called.
    """

    def __init__(self, words: Mapping[str, str]) -> None:
        self.words = words

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern."""
        words, text = config.get("layers_block_type"), config.get("hybrid_override_pattern")
        if words:
            if not isinstance(words, list):
                raise CheckpointError("config.json: 'layers_block_type' is no list", got=repr(words))
            if unknown := sorted({str(word) for word in words} - set(_UNITS)):
                raise CheckpointError(
                    "config.json: unknown kinds of layer", got=", ".join(unknown), legal=", ".join(_UNITS)
                )
            return {"pattern": "".join(_UNITS[word] for word in words)}
        if not text:
            raise CheckpointError("config.json has neither 'layers_block_type' nor 'hybrid_override_pattern'")
        if not isinstance(text, str):
            raise CheckpointError("config.json: 'hybrid_override_pattern' is no text", got=repr(text))
        return {"pattern": text}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The pattern, in the form that `like` has, or else in both."""
        if unknown := sorted(set(arch.pattern) - set(self.words)):
            raise CheckpointError("a hybrid of transformers' has no such sub-layers", got=", ".join(unknown))
        entries: dict[str, Any] = {
            "layers_block_type": [self.words[unit] for unit in arch.pattern],
            "hybrid_override_pattern": "".join(_UNITS[self.words[unit]] for unit in arch.pattern),
            "num_hidden_layers": len(arch.pattern),
        }
        known = {name: entry for name, entry in entries.items() if name in like}
        return known or {"layers_block_type": entries["layers_block_type"]}


class _Untied(Tied):
    """transformers 5 reads `tie_word_embeddings` of this class and ties nothing: the output layer would be random."""

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry; refuses tied embeddings."""
        if not arch.untie_embeddings_and_output_weights:
            raise CheckpointError("NemotronHForCausalLM cannot have tied embeddings")
        return super().write(arch, like)


class _SmallSteps:
    """transformers clamps the steps of this class at `time_step_min`, by default 0.001; Megatron does not."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing."""
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """No limit for a model that was trained here; what the original says for any other."""
        return {} if like or MAMBA not in arch.pattern else {"time_step_min": 1e-30}  # it takes the logarithm


class _WithAttention:
    """transformers asks an attention layer of this class how long a text is, in every forward pass with a cache."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing."""
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing; refuses a model without attention."""
        if ATTENTION not in arch.pattern:
            raise CheckpointError(
                "NemotronHForCausalLM needs attention to run with a cache", got=arch.pattern,
                legal="HybridForCausalLM does not: --hf-class HybridForCausalLM",
            )  # fmt: skip
        return {}


class _Mixture:
    """The experts, where the pattern has some."""

    SAME = (
        Renamed("n_routed_experts", "num_experts", 8),
        Renamed("moe_intermediate_size", "moe_ffn_hidden_size", 7688),
        Renamed("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 7688),
        Renamed("num_experts_per_tok", "moe_router_topk", 2),
    )
    ONLY = (
        Required("moe_latent_size", None), Required("n_group", 1), Required("topk_group", 1),
        Required("n_shared_experts", 1), Required("num_nextn_predict_layers", 0),
    )  # fmt: skip

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        if MOE not in LayerKinds(WORDS).read(config)["pattern"]:
            return {}
        fields: dict[str, Any] = {
            "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": number(config, "routed_scaling_factor", 1.0),
        }  # fmt: skip
        for mapping in (*self.SAME, *self.ONLY):
            fields |= mapping.read(config)
        # Megatron divides by the sum of the chosen where there are several, and only there.
        if flag(config, "norm_topk_prob", True) != (fields["moe_router_topk"] > 1):
            raise CheckpointError(
                "config.json: 'norm_topk_prob' is not supported with so many experts to a token",
                got=f"{config.get('norm_topk_prob', True)} with num_experts_per_tok={fields['moe_router_topk']}",
                legal="true with several, false with one",
            )
        return fields

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        if MOE not in arch.pattern:
            return {}
        if not arch.moe_shared_expert_intermediate_size or arch.num_experts < 2:
            raise CheckpointError(
                "NemotronHForCausalLM needs a shared expert, and two others or more",
                got=f"{arch.num_experts} experts, moe_shared_expert_intermediate_size="
                f"{arch.moe_shared_expert_intermediate_size}",
            )
        factor = arch.moe_router_topk_scaling_factor
        entries: dict[str, Any] = {
            "routed_scaling_factor": 1.0 if factor is None else factor, "norm_topk_prob": arch.moe_router_topk > 1,
        }  # fmt: skip
        for mapping in (*self.SAME, *self.ONLY):
            entries |= mapping.write(arch, like)
        return entries


# What a hybrid of our own has as well.
SHARED: list[Any] = [
    Renamed("vocab_size", "padded_vocab_size", 131_072), Renamed("hidden_size", "hidden_size", 4096),
    Renamed("intermediate_size", "ffn_hidden_size", 21_504), Renamed("num_attention_heads", "num_attention_heads", 32),
    Renamed("num_key_value_heads", "num_query_groups", 8), Renamed("head_dim", "kv_channels", _head_dim),
    Renamed("max_position_embeddings", "max_position_embeddings", 4096),
    Renamed("mamba_num_heads", "mamba_num_heads", 128), Renamed("mamba_head_dim", "mamba_head_dim", 64),
    Renamed("ssm_state_size", "mamba_state_dim", 128), *MIXER_CONFIG, Required("mamba_hidden_act", "silu"),
    Required("mamba_proj_bias", False), Required("attention_bias", False), Required("sliding_window", None),
    Required("mlp_bias", False), _Mixture(),
]  # fmt: skip
NEMOTRON_H = Family(
    "NemotronHForCausalLM", "nemotron_h", "backbone.layers.{}", "",
    [*OUTER, *MIXER, *ATTENTION_ROWS, *_MLP, *EXPERTS],
    [LayerKinds(WORDS), *SHARED, _Untied(), _WithAttention(), _SmallSteps(), Required("mlp_hidden_act", "relu2"),
     Fixed(activation="squared_relu", gated_linear_unit=False, position_embedding_type="none")],
)  # fmt: skip
