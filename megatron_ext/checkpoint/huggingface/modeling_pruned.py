"""LlamaForCausalLM with layers that differ in size, or have no attention or no MLP, or a linear map in their place.

`layer_changes` of config.json has one entry for each layer: the sizes that are its own, under `skip` the sub-layers
that it does not have ("self_attn", "mlp"), under `linear` those that are a linear map of rank `linear_rank`. Everything
else, caches, attention backends and generation among it, is that of transformers. Load it with
`trust_remote_code=True`.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

# The norms of each sub-layer.
NORMS = {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}


class PrunedLlamaConfig(LlamaConfig):
    """The configuration of LlamaForCausalLM and `layer_changes`; what embeddings are multiplied by, if it is said."""

    model_type = "pruned_llama"
    layer_changes: Any = None
    embedding_multiplier: Any = None


class Nothing(nn.Module):
    """Stands where a layer has no such sub-layer: it adds nothing to the residual stream."""

    def __init__(self, returns_weights: bool) -> None:
        super().__init__()
        self.returns_weights = returns_weights

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the input (batch, sequence, hidden), with attention's second result where there is one."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.returns_weights else zeros


class LinearUpdate(nn.Module):
    """Stands in a sub-layer's place: up (down x) + bias of the residual stream, a bias alone if the rank is 0."""

    def __init__(self, hidden_size: int, rank: int, returns_weights: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, hidden_size)) if rank else None
        self.up = nn.Parameter(torch.zeros(hidden_size, rank)) if rank else None
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.returns_weights = returns_weights

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(batch, sequence, hidden) to the same, with attention's second result where there is one."""
        update = self.bias.expand_as(hidden_states)
        if self.down is not None and self.up is not None:
            update = functional.linear(functional.linear(hidden_states, self.down), self.up, self.bias)
        return (update, None) if self.returns_weights else update


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM whose layers are what `config.layer_changes` says."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        layers: Any = getattr(self, self.base_model_prefix).layers
        attentions = 0
        for index, changes in enumerate(config.layer_changes):
            own = copy.copy(config)
            for name, value in changes.items():
                setattr(own, name, value)
            resized = set(changes) - {"skip", "linear", "linear_rank"}
            layer = type(layers[index])(own, index) if resized else layers[index]
            layers[index] = layer
            for name in changes.get("skip", ()):
                setattr(layer, name, Nothing(returns_weights=name == "self_attn"))
            for name in changes.get("linear", ()):
                update = LinearUpdate(config.hidden_size, changes["linear_rank"], returns_weights=name == "self_attn")
                setattr(layer, name, update)
            for name in (*changes.get("skip", ()), *changes.get("linear", ())):
                for norm in NORMS[name]:
                    setattr(layer, norm, nn.Identity())
            # The first layer with a cache must be number 0: transformers asks it how long the sequence is.
            if hasattr(getattr(layer, "self_attn", None), "layer_idx"):
                layer.self_attn.layer_idx, layer.self_attn.config = attentions, config
                attentions += 1
        if config.embedding_multiplier is not None:  # of a narrower model, as that of the model it was cut from
            embeddings: Any = self.get_input_embeddings()
            embeddings.scalar_embed_scale = config.embedding_multiplier
            embeddings.embed_scale = torch.tensor(config.embedding_multiplier)
        self.post_init()


try:  # transformers 5 renames weights of some classes when it reads them, and goes by this name
    from transformers import conversion_mapping

    if (renaming := conversion_mapping.get_checkpoint_conversion_mapping("llama")) is not None:
        conversion_mapping.register_checkpoint_conversion_mapping("pruned_llama", renaming, overwrite=True)
except ImportError:
    renaming = None
