"""Tiny models of transformers, one or more for each family that is converted, with random weights everywhere."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQUENCE = 24
_ATTENTION: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_HYBRID: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "max_position_embeddings": 64,
}  # fmt: skip

# Name: class, configuration. What differs between models of a family is spread over them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", _ATTENTION | {"rope_parameters": _LLAMA3, "max_position_embeddings": 131_072, "head_dim": 16}),
    "llama-biases": (
        "Llama",
        _ATTENTION | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", _ATTENTION | {"sliding_window": None, "head_dim": 24, "num_attention_heads": 6}),
    "qwen2": ("Qwen2", _ATTENTION | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _ATTENTION | {"head_dim": 16}),
    "phi3": ("Phi3", _ATTENTION | {"pad_token_id": 0, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mixtral-experts": ("Mixtral", _ATTENTION | {"num_local_experts": 4, "head_dim": 24}),
    "qwen3-experts": (
        "Qwen3Moe",
        _ATTENTION | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
                      "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "granite": (
        "Granite",
        _ATTENTION | {"embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22,
                      "logits_scaling": 7.0, "tie_word_embeddings": True},
    ),
    "glm4": ("Glm4", _ATTENTION | {"head_dim": 16, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2",
        _ATTENTION | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "num_hidden_layers": 3,
                      "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        _ATTENTION | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "num_hidden_layers": 3,
                      "sliding_window_pattern": 2},
    ),
    "nemotron": ("Nemotron", _ATTENTION | {"head_dim": 16}),
    "olmo2": ("Olmo2", _ATTENTION | {"pad_token_id": 0}),
    "bamba": (
        "Bamba",
        _ATTENTION | {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
                      "mamba_d_state": 8, "mamba_n_groups": 2},
    ),
    "mamba2": (
        "Mamba2",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16,
         "n_groups": 2, "tie_word_embeddings": True},
    ),
    "nemotron-h": (
        "NemotronH",
        _HYBRID | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]},
    ),
    "nemotron-h-experts": (
        "NemotronH",
        _HYBRID | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_routed_experts": 4,
                   "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 24, "num_experts_per_tok": 2,
                   "routed_scaling_factor": 2.5},
    ),
}  # fmt: skip


def tokens() -> Tensor:
    """(2, s)."""
    return torch.randint(96, (2, SEQUENCE), generator=torch.Generator().manual_seed(8))


def make(name: str, path: Path, shard_size: str = "40KB", dt_bias: float | None = None, **changes: Any) -> Tensor:
    """Save a model, every weight of it random, in several shards; returns its logits (b, s, v) of `tokens`.

    Args:
        name: One of `MODELS`.
        path: A new directory.
        shard_size: The largest size of a shard.
        dt_bias: What the time steps of Mamba-2 layers begin at, before the softplus; random by default.
        **changes: Other values in the configuration; `class` is another class.
    """
    import transformers

    family, config = MODELS[name]
    family = changes.pop("class", family)
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    made = getattr(transformers, config_class)(**config | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(made).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if "inv_freq" in key or "embed_scale" in key:
                continue
            if key.endswith("dt_bias") and dt_bias is not None:
                value.fill_(dt_bias)
                continue
            value.copy_(noise * value.shape[-1] ** -0.5 if value.dim() > 1 else ("bias" not in key) + 0.2 * noise)
        logits = model(tokens()).logits
    model.save_pretrained(path, max_shard_size=shard_size)
    return logits
