"""Module specs for what the stock `hybrid_stack_spec` cannot say.

What single layers have of their own, other norms, linear sub-layers.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.models.hybrid.hybrid_layer_specs import TENorm, hybrid_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.heads_norm import HeadsNorm
from megatron_ext.models.linear_sublayer import StackWithLinear, linear_spec
from megatron_ext.models.pattern import LINEAR
from megatron_ext.models.rotary import ArchitectureRotaryEmbedding, is_local
from megatron_ext.platform.transformer_engine import TorchDotProductAttention

# Of each kind of layer, the attribute that adds its output to the residual stream, and what its pre-norm is part of.
_ADDS = {"mamba_layer": "mamba_bda", "attention_layer": "self_attn_bda", "mlp_layer": "mlp_bda", "moe_layer": "mlp_bda"}


def stack_spec(architecture: Architecture) -> ModuleSpec | None:
    """The spec that builds each layer as it is; None where the stock one does."""
    own = architecture
    updates = own.post_norm or own.residual_multiplier != 1
    norms = own.qk_layernorm or own.qk_layernorm_of_all_heads or not own.pre_norm
    seeing = own.attention_windows or own.attention_softcap is not None
    if not (own.layer_sizes or norms or updates or seeing or LINEAR in own.pattern):
        return None
    spec = copy.deepcopy(hybrid_stack_spec)
    submodules: Any = spec.submodules
    if LINEAR in own.pattern:
        spec.module, submodules.gdn_layer = StackWithLinear, linear_spec(own.linear_rank)
    if own.qk_layernorm:  # the norms whose class Megatron would take from Transformer Engine itself
        attention = submodules.attention_layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = TENorm
    if own.qk_layernorm_of_all_heads:
        attention = submodules.attention_layer.submodules.self_attention.submodules
        attention.q_layernorm = partial(HeadsNorm, heads=own.num_attention_heads)
        attention.k_layernorm = partial(HeadsNorm, heads=own.num_query_groups)
        submodules.attention_layer.module = _with_groups(submodules.attention_layer.module)
    if not own.pre_norm:
        _without_pre_norms(submodules)
    for name, adds in _ADDS.items():
        layer = getattr(submodules, name)
        if own.layer_sizes and name in ("mamba_layer", "mlp_layer"):
            layer.module = _sized(layer.module, own)
        if updates:
            layer.module = _updating(layer.module, own, adds)
    if own.attention_windows or own.attention_softcap is not None:
        attention = submodules.attention_layer
        attention.module = _seeing(attention.module, own)
        if own.attention_softcap is not None:  # which no kernel of Transformer Engine's has
            attention.submodules.self_attention.submodules.core_attention = TorchDotProductAttention
    return spec


def _without_pre_norms(submodules: Any) -> None:
    """Projections without the norm that is fused into them."""
    submodules.mamba_layer.submodules.mixer.submodules.in_proj = TEColumnParallelLinear
    submodules.attention_layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    submodules.mlp_layer.submodules.mlp.keywords["submodules"].linear_fc1 = TEColumnParallelLinear


def _sized(layer: Any, architecture: Architecture) -> Any:
    """A layer class that is built with the sizes its position in the model has."""

    class Sized(layer):
        def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
            sizes = architecture.at(layer_number - 1)
            own = copy.copy(config)  # not dataclasses.replace: validation would derive other fields anew
            own.ffn_hidden_size, own.mamba_num_heads = sizes.ffn_hidden_size, sizes.mamba_num_heads
            super().__init__(own, *args, layer_number=layer_number, **kwargs)

    return Sized


def _with_groups(layer: Any) -> Any:
    """An attention layer class whose norms over all heads know which ranks share these, those of a teacher, too."""

    class Grouped(layer):
        def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
            super().__init__(*args, pg_collection=pg_collection, **kwargs)
            for norm in (self.self_attention.q_layernorm, self.self_attention.k_layernorm):
                norm.tp_group = pg_collection.tp

    return Grouped


def _seeing(layer: Any, architecture: Architecture) -> Any:
    """An attention layer class with the window, positions and bounded logits that its place in the model has."""

    class Seeing(layer):
        def __init__(self, config: Any, *args: Any, layer_number: int, pg_collection: Any, **kwargs: Any) -> None:
            window, own = architecture.window(layer_number - 1), copy.copy(config)
            own.window_size, own.attention_softcap = (window - 1, 0) if window else None, architecture.attention_softcap
            super().__init__(own, *args, layer_number=layer_number, pg_collection=pg_collection, **kwargs)
            self._rotary = None
            if is_local(architecture, layer_number - 1):
                cpu = config.use_cpu_initialization
                self._rotary = ArchitectureRotaryEmbedding(architecture, cpu, pg_collection.cp, local=True)
            self._share = config.context_parallel_size

        def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
            if self._rotary is not None and rotary_pos_emb is not None:
                rotary_pos_emb = self._rotary(rotary_pos_emb.shape[0] * self._share)
            return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    return Seeing


def _updating(layer: Any, architecture: Architecture, adds: str) -> Any:
    """A layer class whose output is normed, or multiplied, before it is added to the residual stream.

    Args:
        layer: The class.
        architecture: The model.
        adds: The layer's attribute that adds.
    """

    class Updating(layer):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if architecture.post_norm:
                norm: Any = TENorm
                self.post_norm: Any = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            add = getattr(self, adds)

            def chosen(training: bool, fused: bool) -> Callable[..., Tensor]:
                def update(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
                    return add(training, fused)(self._update(*output), residual, dropout)

                return update

            setattr(self, adds, chosen)

        def _update(self, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            factor = architecture.residual_multiplier
            if architecture.post_norm:
                output, bias = self.post_norm(output if bias is None else output + bias), None
            if factor != 1:
                output, bias = output * factor, None if bias is None else bias * factor
            return output, bias

    return Updating
