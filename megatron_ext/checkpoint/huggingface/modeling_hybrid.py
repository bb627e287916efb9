"""Hybrids of Mamba-2, attention, MLPs and experts: NemotronHForCausalLM, and what that class cannot be.

Entries of config.json beside those of Nemotron-H: `mlp_hidden_act` (any) and `mlp_gated`; `rotary`, the rotary
positions of attention as other models have them under `rope_parameters`, or null; `qk_norm`, norms on query and key
heads; `layer_changes`, for each layer the sizes that are its own, or the rank of the linear map that it is. Caches,
attention backends and generation are those of transformers. Load it with `trust_remote_code=True`.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM, conversion_mapping
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHRMSNorm,
    eager_attention_forward,
)


class HybridConfig(NemotronHConfig):
    """The configuration of NemotronHForCausalLM, and what this class has beside."""

    model_type = "megatron_hybrid"
    mlp_gated: Any = False
    rotary: Any = None
    qk_norm: Any = False
    layer_changes: Any = None


class GatedMLP(nn.Module):
    """(batch, sequence, hidden) to the same: the activation of a gate times the up projection, and down."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act_fn = ACT2FN[config.mlp_hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LinearUpdate(nn.Module):
    """(batch, sequence, hidden) to the same: up (down x) + bias, a bias alone if the rank is 0."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, hidden_size)) if rank else None
        self.up = nn.Parameter(torch.zeros(hidden_size, rank)) if rank else None
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The update."""
        if self.down is None or self.up is None:
            return self.bias.expand_as(hidden_states)
        return functional.linear(functional.linear(hidden_states, self.down), self.up, self.bias)


class LinearLayer(nn.Module):
    """A layer that is a linear map of the residual stream, without a norm."""

    def __init__(self, config: HybridConfig, rank: int) -> None:
        super().__init__()
        self.block_type = "mlp"
        self.mixer = LinearUpdate(config.hidden_size, rank)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The stream with the update."""
        return hidden_states + self.mixer(hidden_states)


class Attention(NemotronHAttention):
    """NemotronHAttention with norms on query and key heads and with rotary positions, where the model has them."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        eps = config.layer_norm_epsilon
        self.q_norm = NemotronHRMSNorm(self.head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = NemotronHRMSNorm(self.head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.rotary_emb = None
        if config.rotary:
            own: Any = copy.copy(config)
            own.rope_parameters = {"partial_rotary_factor": 1.0} | config.rotary
            self.rotary_emb = NemotronRotaryEmbedding(own)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As NemotronHAttention."""
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.rotary_emb is not None:
            query, key = apply_rotary_pos_emb(query, key, *self.rotary_emb(value, position_ids))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        chosen: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class RecurrentCache(DynamicCache):
    """The cache of a model without attention, which counts tokens itself: transformers asks an attention layer."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config=config)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Tokens with these, and where they begin."""
        return self.seen + query_length, 0


class HybridForCausalLM(NemotronHForCausalLM):
    """NemotronHForCausalLM with the MLPs, attention and sizes that the configuration says, attention or none."""

    config_class = HybridConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        layers: Any = getattr(self, self.base_model_prefix).layers
        for index, changes in enumerate(config.layer_changes):
            own = copy.copy(config)
            for name, value in changes.items():
                setattr(own, name, value)
            kind = layers[index].block_type
            if "linear_rank" in changes:
                layers[index] = LinearLayer(config, changes["linear_rank"])
            elif kind == "mlp" and config.mlp_gated:
                layers[index].mixer = GatedMLP(own)
            elif kind == "full_attention":
                layers[index].mixer = Attention(config, index)
            elif changes:
                layers[index] = type(layers[index])(own, index)
            if kind == "linear_attention":  # Nemotron-H's would be clamped from below, as in no training
                layers[index].mixer.time_step_limit = (0.0, float("inf"))
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As NemotronHForCausalLM."""
        if self._recurrent and kwargs.get("past_key_values") is None and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = RecurrentCache(self.config)
        inherited: Any = super()
        return inherited.generate(*args, **kwargs)

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        """As NemotronHForCausalLM."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self._recurrent and use_cache and past_key_values is None:
            past_key_values = RecurrentCache(self.config)
        output = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep,
            **kwargs,
        )  # fmt: skip
        if isinstance(past_key_values, RecurrentCache):
            given = input_ids if inputs_embeds is None else inputs_embeds
            past_key_values.seen += given.shape[1]
        return output

    @property
    def _recurrent(self) -> bool:
        kinds: Any = self.config.layers_block_type
        return "full_attention" not in kinds


# transformers renames weights of Nemotron-H when it reads them, and goes by the model's type.
_RENAMING: Any = conversion_mapping.get_checkpoint_conversion_mapping("nemotron_h")
conversion_mapping.register_checkpoint_conversion_mapping("megatron_hybrid", _RENAMING, overwrite=True)
