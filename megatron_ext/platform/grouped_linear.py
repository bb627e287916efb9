"""The linear layers of a mixture of experts, in plain torch under Transformer Engine's names (where it is absent).

Parameters, process groups and checkpoint keys are those of Transformer Engine's `GroupedLinear` as Megatron wraps it,
so that checkpoints go from one to the other.

Shapes: t tokens of all local experts, expert after expert; i features in, o features out (this rank's part of each).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.platform import grouped_products


class TorchGroupedLinear(torch.nn.Module):
    """One linear layer per local expert: parameters `weight0`, `weight1`, ... of (o, i) and `bias0`, ... of (o,).

    Args:
        num_gemms: Experts on this rank.
        input_size: Features in, before expert tensor parallelism splits them.
        output_size: Features out, likewise.
        split: What expert tensor parallelism splits: dimension 0 of a weight (column parallel) or 1 (row parallel). The
            token dispatcher does the communication.
        config: Megatron's transformer config.
        init_method: Fills a weight in place.
        bias: Whether there are biases.
        skip_bias_add: Return the biases instead of adding them.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        split: int,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **_: Any,  # options of the fused kernels that have no meaning here
    ) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import _initialize_affine_weight_gpu
        from megatron.core.utils import divide, get_pg_size

        self.num_gemms, self.use_bias, self.skip_bias_add = num_gemms, bias, skip_bias_add
        self._split, self._groups = split, pg_collection
        shape = [output_size, input_size]
        shape[split] = divide(shape[split], get_pg_size(pg_collection.expt_tp))
        self.out_features, self.in_features = shape
        # Gradients of experts that ranks do not share are reduced over fewer ranks than those of other weights.
        apart = config.expert_model_parallel_size > 1
        apart |= config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        device = torch.cuda.current_device()
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization:
                _initialize_affine_weight_gpu(weight, init_method, partition_dim=split, is_expert=True)
            self._add(f"weight{i}", weight, apart)
            if bias:
                zeros = torch.zeros(self.out_features, dtype=config.params_dtype, device=device)
                self._add(f"bias{i}", torch.nn.Parameter(zeros), apart)
        self.register_load_state_dict_pre_hook(_one_extra_state)

    def _add(self, name: str, parameter: Any, apart: bool) -> None:
        parameter.allreduce = not apart
        self.register_parameter(name, parameter)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Each expert's layer on its `m_splits[i]` rows of x (t, i): (t, o), and the biases that were not added."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.use_bias else None
        if biases is None and grouped_products.together(x, weights):
            return grouped_products.grouped_products(x, m_splits, weights), None
        added = biases if biases is not None and not self.skip_bias_add else [None] * self.num_gemms
        parts = zip(x.split(m_splits), weights, added, strict=True)
        return torch.cat([F.linear(*part) for part in parts]), biases if self.skip_bias_add else None

    def get_extra_state(self) -> None:
        """Where Transformer Engine keeps the scales of FP8: nothing, but a checkpoint has the key."""

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As Transformer Engine's: of all experts one tensor (experts, o, i), under the key `{prefix}weight`."""
        from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
        from megatron.core.utils import get_pg_rank, get_pg_size

        groups, result = self._groups, {}
        experts = get_pg_size(groups.ep) * self.num_gemms
        for i in range(self.num_gemms):
            expert = get_pg_rank(groups.ep) * self.num_gemms + i
            state = {f"{i}.weight": getattr(self, f"weight{i}"), f"{i}._extra_state": None}
            splits = {f"{i}.weight": self._split}
            if self.use_bias:
                state[f"{i}.bias"] = getattr(self, f"bias{i}")
                splits |= {f"{i}.bias": 0} if self._split == 0 else {}
            singleton = metadata.get("singleton_local_shards", False)
            offsets = sharded_offsets if singleton else (*sharded_offsets, (len(sharded_offsets), expert, experts))
            shards = make_sharded_tensors_for_checkpoint(
                state, "", splits, offsets, tp_group=groups.expt_tp, dp_cp_group=metadata["dp_cp_group"]
            )
            replace_prefix_for_sharding(shards, f"{i}.", f"{expert}.{prefix}" if singleton else prefix)
            for name, shard in shards.items():
                # Experts have data-parallel replicas of their own.
                shard.replica_id = (*shard.replica_id[:2], get_pg_rank(groups.expt_dp))
                kind = name.removeprefix(f"{i}.")
                result[f"{prefix}{kind}{'' if kind == '_extra_state' and i == 0 else i}"] = shard
        return result


def _one_extra_state(module: TorchGroupedLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Torch wants one per module, a checkpoint has one per expert."""
    for i in range(1, module.num_gemms):
        state_dict.pop(f"{prefix}_extra_state{i}", None)
    state_dict.setdefault(f"{prefix}_extra_state", None)


class TorchColumnParallelGroupedLinear(TorchGroupedLinear):
    """Expert tensor parallelism splits the features out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, split=0, **kwargs)


class TorchRowParallelGroupedLinear(TorchGroupedLinear):
    """Expert tensor parallelism splits the features in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, split=1, **kwargs)
