"""Module specs for what the stock `hybrid_stack_spec` cannot say.

Sizes of single layers, norms on query and key, linear sub-layers.
"""

import copy
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_specs import TENorm, hybrid_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.linear_sublayer import StackWithLinear, linear_spec
from megatron_ext.models.pattern import LINEAR


def stack_spec(architecture: Architecture) -> ModuleSpec | None:
    """The spec that builds each layer as it is; None where the stock one does."""
    if not architecture.layer_sizes and not architecture.qk_layernorm and LINEAR not in architecture.pattern:
        return None
    spec = copy.copy(hybrid_stack_spec)
    submodules: Any = copy.copy(spec.submodules)
    spec.submodules = submodules
    if LINEAR in architecture.pattern:
        spec.module, submodules.gdn_layer = StackWithLinear, linear_spec(architecture.linear_rank)
    if architecture.qk_layernorm:
        submodules.attention_layer = _with_qk_norms(submodules.attention_layer)
    for name in ("mamba_layer", "mlp_layer") if architecture.layer_sizes else ():
        layer = copy.copy(getattr(spec.submodules, name))
        layer.module = _sized(layer.module, architecture)
        setattr(spec.submodules, name, layer)
    return spec


def _with_qk_norms(layer: Any) -> Any:
    """Attention with the norms whose class Megatron would take from Transformer Engine itself."""
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention.submodules.q_layernorm = TENorm
    layer.submodules.self_attention.submodules.k_layernorm = TENorm
    return layer


def _sized(layer: Any, architecture: Architecture) -> Any:
    """A layer class that is built with the sizes its position in the model has."""

    class Sized(layer):
        def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
            sizes = architecture.at(layer_number - 1)
            own = copy.copy(config)  # not dataclasses.replace: validation would derive other fields anew
            own.ffn_hidden_size, own.mamba_num_heads = sizes.ffn_hidden_size, sizes.mamba_num_heads
            super().__init__(own, *args, layer_number=layer_number, **kwargs)

    return Sized
