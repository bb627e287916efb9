"""A linear sub-layer: x + up (down x) + bias on the residual stream, without norm, activation or tensor parallelism.

It stands where depth pruning took a sub-layer away (arXiv 2407.16286, "emulated updates"). Of rank 0 it is a bias. The
weights are the same on every tensor-parallel rank, as those of norms are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_ext.models.pattern import LINEAR


class LinearSublayer(MegatronModule):
    """One linear sub-layer.

    Args:
        config: Megatron's `TransformerConfig`.
        rank: Of the map; 0 for a bias alone.
        layer_number: From 1, in the whole model.
        pg_collection: The process groups.
        **others: What Megatron gives to every layer, and this has no use for.
    """

    def __init__(self, config: Any, rank: int, layer_number: int, pg_collection: Any, **others: Any) -> None:
        super().__init__(config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        hidden = config.hidden_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        empty: dict[str, Any] = {"device": device, "dtype": config.params_dtype}
        self.down = nn.Parameter(torch.empty(rank, hidden, **empty)) if rank else None
        self.up = nn.Parameter(torch.zeros(hidden, rank, **empty)) if rank else None
        self.bias = nn.Parameter(torch.zeros(hidden, **empty))
        if self.down is not None and config.perform_initialization:  # at first it does nothing, and `up` learns
            config.init_method(self.down)
        for parameter in self.parameters():
            # Each tensor rank sees a part of the sequence, and their gradients are added.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Float[Tensor, "s b h"], *args: Any, **kwargs: Any) -> Float[Tensor, "s b h"]:
        """The stream with the update."""
        x = hidden_states.to(self.bias.dtype)  # it may be in fp32 (`--fp32-residual-connection`)
        if self.down is None or self.up is None:
            return hidden_states + self.bias
        return hidden_states + F.linear(F.linear(x, self.down), self.up, self.bias)


def linear_spec(rank: int) -> ModuleSpec:
    """What builds one."""
    return ModuleSpec(module=LinearSublayer, params={"rank": rank})


class StackWithLinear(HybridStack):
    """Megatron's stack, whose pattern may have linear sub-layers.

    It builds only layers of its own letters: a linear one goes by the letter of gated delta nets, which our models do
    not have, and whose spec is `linear_spec`.
    """

    def __init__(self, config: Any, submodules: Any, *args: Any, layer_type_list: list[str], **kwargs: Any) -> None:
        known = [Symbols.GDN if kind == LINEAR else kind for kind in layer_type_list]
        super().__init__(config, submodules, *args, layer_type_list=known, **kwargs)
        self.layer_type_list = layer_type_list
