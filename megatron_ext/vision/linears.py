"""Linear layers of a network: plain ones, or Megatron's, split over tensor-parallel ranks. The network is the same.

A plain network needs no process group, and can be exported. A split one has the same parameter names, of which each
rank holds a part: `partition_dim` says along which axis.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Linears(Protocol):
    """What a network's layers are made with.

    Attributes:
        size: Tensor-parallel ranks.
        rank: This one.
    """

    size: int
    rank: int

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A layer whose outputs are split over ranks; its inputs are whole."""
        ...

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A layer whose inputs are split over ranks; its outputs are whole."""
        ...

    def shared(self, x: Tensor) -> Tensor:
        """x, which all ranks have, for use by each rank's part: its gradient is the sum of theirs."""
        ...


class PlainLinears:
    """`torch.nn.Linear`."""

    size, rank = 1, 0

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A layer with all its outputs."""
        return nn.Linear(inputs, outputs, bias)

    row = column

    def shared(self, x: Tensor) -> Tensor:
        """x."""
        return x


class MegatronLinears:
    """Megatron's `ColumnParallelLinear` and `RowParallelLinear`.

    Args:
        config: Megatron's `TransformerConfig`.
        group: Tensor-parallel ranks.
    """

    def __init__(self, config: Any, group: Any) -> None:
        self._config, self._group = config, group
        self.size, self.rank = group.size(), group.rank()

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A layer whose outputs are split over ranks."""
        from megatron.core.tensor_parallel import ColumnParallelLinear

        class Column(ColumnParallelLinear):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x)[0]

        return Column(inputs, outputs, **self._common(bias), gather_output=False)

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A layer whose inputs are split over ranks."""
        from megatron.core.tensor_parallel import RowParallelLinear

        class Row(RowParallelLinear):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x)[0]

        return Row(inputs, outputs, **self._common(bias), input_is_parallel=True, skip_bias_add=False)

    def shared(self, x: Tensor) -> Tensor:
        """x; the ranks' gradients are summed."""
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        return copy_to_tensor_model_parallel_region(x, self._group)

    def _common(self, bias: bool) -> dict[str, Any]:
        return {"config": self._config, "init_method": _leave, "bias": bias, "tp_group": self._group}


def _leave(weight: Tensor) -> Tensor:
    """The network fills its weights itself."""
    return weight


def split(parameter: nn.Parameter, axis: int, linears: Linears) -> nn.Parameter:
    """Mark a parameter as this rank's part along an axis, as Megatron marks its own."""
    if linears.size > 1:
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    return parameter


@contextmanager
def from_the_seed() -> Iterator[None]:
    """Random numbers from the first one of torch's seed on; then those of before go on.

    For the first weights of a training: how many numbers were drawn before depends on the layout, because Megatron
    tries its fused functions on random tensors of a rank's size.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(torch.initial_seed())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def fill(parameter: Tensor, linears: Linears, draw: Callable[[Tensor], Any]) -> None:
    """Draw a whole parameter and keep this rank's part, so that what is drawn does not depend on the split.

    Nor on the type: in 16 bits one of 500 random numbers is the limit of what is drawn, such as 100 deviations.
    """
    split, shape = getattr(parameter, "tensor_model_parallel", False), list(parameter.shape)
    axis = parameter.partition_dim if split else 0  # type: ignore[attr-defined]
    shape[axis] *= linears.size if split else 1
    kind = torch.promote_types(parameter.dtype, torch.float32)
    whole = torch.empty(shape, dtype=kind, device=parameter.device)
    draw(whole)
    with torch.no_grad():
        parameter.copy_(whole.chunk(linears.size, axis)[linears.rank] if split else whole)


def sharded_tensors(
    module: nn.Module, groups: Any, prefix: str, offsets: Any, more: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """Each rank's parts of all tensors of a network, for Megatron's checkpoints.

    Args:
        module: The network.
        groups: Process groups.
        prefix: Of names in the checkpoint.
        offsets: Megatron's.
        more: From the name of a split parameter to that of a buffer which is split alike.
    """
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    axes = {
        name: parameter.partition_dim  # type: ignore[attr-defined]
        for name, parameter in module.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    if more is not None:
        axes |= {more(name): axis for name, axis in axes.items()}
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(keep_vars=True), prefix, axes, offsets, tp_group=groups.tp, dp_cp_group=groups.dp_cp
    )
