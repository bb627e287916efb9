"""Transformers whose MLPs are mixtures of experts: `MixtralForCausalLM` and `Qwen3MoeForCausalLM`.

A router's softmax is over all experts in transformers, and what is chosen is then divided by its sum, which is
Megatron's softmax over the chosen; where it is not divided, Megatron has `--moe-router-pre-softmax`.
"""

from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Layers, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import flag, whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, GATED_MLP, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, gated_mlp_mapping
from megatron_ext.checkpoint.huggingface.qwen import QK_NORMS
from megatron_ext.checkpoint.huggingface.windows import Window
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import MLP, MOE

_FC1, _FC2 = "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"
_NORM = ParamMapping("E", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight")


def _experts(mixture: str, gate: str, up: str, down: str) -> list[ParamMapping]:
    """A mixture of gated experts, by the names of its projections."""
    each = f"{mixture}.experts.{{expert}}"
    return [
        _NORM,
        ParamMapping("E", f"{mixture}.gate.weight", "mlp.router.weight"),
        *gated_mlp_mapping(f"{each}.{gate}.weight", f"{each}.{up}.weight", _FC1, MOE),
        ParamMapping("E", f"{each}.{down}.weight", _FC2),
    ]


class _Count:
    """The number of experts, which transformers 5 writes under one name and reads under two."""

    def __init__(self, *names: str, default: int) -> None:
        self.names, self.default = names, default

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        given = next((name for name in self.names if config.get(name) is not None), self.names[0])
        return {"num_experts": whole(config, given, self.default)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry, under the names that `like` has."""
        return dict.fromkeys([name for name in self.names if name in like] or self.names[:1], arch.num_experts)


class _SparseLayers:
    """Which layers have experts: every so many, but for those that are named."""

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern."""
        every, dense = whole(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            raise CheckpointError("config.json: 'mlp_only_layers' is no list of layers", got=repr(dense))
        layers = range(whole(config, "num_hidden_layers", 24))
        return {"pattern": "".join("*" + _kind(layer not in dense and not (layer + 1) % every) for layer in layers)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        kinds = arch.pattern[1::2]
        dense = [layer for layer, kind in enumerate(kinds) if kind == MLP]
        return {"num_hidden_layers": len(kinds), "decoder_sparse_step": 1, "mlp_only_layers": dense}


def _kind(sparse: bool) -> str:
    return MOE if sparse else MLP


class _Experts:
    """A mixture of experts; Qwen's configuration says whether what is chosen is divided by its sum."""

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        return {"moe_router_pre_softmax": not flag(config, "norm_topk_prob", False)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {"norm_topk_prob": not arch.moe_router_pre_softmax}


_ROUTED: list[Any] = [Fixed(add_bias_linear=False, moe_router_score_function="softmax"), Tied()]
_DENSE_SIZES = [mapping for mapping in sizes(32_768, 4) if not isinstance(mapping, Layers)]

MIXTRAL = Family(
    "MixtralForCausalLM", "mixtral", "model.layers.{}", "*E",
    [*EMBEDDINGS, *ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"), *FINAL_NORM],
    [*sizes(131_072, 8), Layers("*E"), *GATED, Renamed("rms_norm_eps", "norm_epsilon", 1e-5), Rope(base=1e6),
     Window(131_072, missing=None), *_ROUTED, _Count("num_local_experts", "num_experts", default=8),
     Renamed("intermediate_size", "moe_ffn_hidden_size", 14_336),
     Renamed("num_experts_per_tok", "moe_router_topk", 2)],
)  # fmt: skip
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM", "qwen3_moe", "model.layers.{}", ("*", "-E"),
    [*EMBEDDINGS, *ATTENTION, *QK_NORMS, *GATED_MLP,
     *_experts("mlp", "gate_proj", "up_proj", "down_proj"), *FINAL_NORM],
    [*_DENSE_SIZES, _SparseLayers(), *GATED, Rope(), Window(32_768, switch="use_sliding_window"),
     *_ROUTED, Required("attention_bias", False), Fixed(qk_layernorm=True),
     _Count("num_experts", "num_local_experts", default=128),
     Renamed("moe_intermediate_size", "moe_ffn_hidden_size", 768), Renamed("num_experts_per_tok", "moe_router_topk", 8),
     _Experts()],
)  # fmt: skip
