"""RMSNorm over all query heads together, or all key heads, as OLMo 2 has it: across tensor-parallel ranks."""

from typing import Any

import torch
from jaxtyping import Float
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn


class HeadsNorm(MegatronModule):
    """Of `heads` heads over all ranks, this rank's.

    Args:
        config: Megatron's `TransformerConfig`.
        hidden_size: Channels of a head.
        eps: Added to the mean square.
        heads: Over all ranks.
        **others: What Megatron gives to every norm, and this has no use for.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, heads: int, **others: Any) -> None:
        super().__init__(config)
        self.eps, self._channels = eps, heads * hidden_size
        self.tp_group: Any = None
        """The ranks that share the heads; Megatron's own by default."""
        self._zero_centered = config.layernorm_zero_centered_gamma
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        make = torch.zeros if self._zero_centered else torch.ones
        own = (heads // config.tensor_model_parallel_size, hidden_size)
        self.heads_weight = nn.Parameter(make(own[0] * own[1], device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.heads_weight, True, 0, 1)

    def forward(self, x: Float[Tensor, "s b n d"]) -> Float[Tensor, "s b n d"]:
        """Heads of this rank, normed with those of all."""
        exact = x.float()
        squares = exact.square().sum((-2, -1), keepdim=True)
        if self.config.tensor_model_parallel_size > 1:  # what each rank makes of the sum adds to its gradient
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, group=self.tp_group), group=self.tp_group
            )
        gamma = self.heads_weight.float().view(x.shape[-2:]) + self._zero_centered
        return (exact * (squares / self._channels + self.eps).rsqrt() * gamma).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, split over the tensor ranks."""
        known = ensure_metadata_has_dp_cp_group(metadata)
        group: Any = get_tensor_model_parallel_group_if_none(self.tp_group)
        return make_sharded_tensors_for_checkpoint(
            {"heads_weight": self.heads_weight}, prefix, {"heads_weight": 0}, sharded_offsets, tp_group=group,
            dp_cp_group=known["dp_cp_group"],
        )  # fmt: skip
