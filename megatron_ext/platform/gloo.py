"""Two things NCCL does and gloo does not: averaging reductions, and gathering zero-dimensional tensors."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_ext.platform.replacements import replace


class _AveragedWork:
    """A pending sum that becomes an average when it is waited for."""

    def __init__(self, work: Any, divide: Callable[[], None]) -> None:
        self._work, self._divide = work, divide

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        done = self._work.wait(*args, **kwargs)
        self._divide()
        self._divide = lambda: None
        return done

    def is_completed(self) -> bool:
        return self._work.is_completed()


def _averaging(fn: Callable[..., Any], output_name: str) -> Callable[..., Any]:
    @functools.wraps(fn)
    def reduce(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("op") != dist.ReduceOp.AVG:
            return fn(*args, **kwargs)
        kwargs["op"] = dist.ReduceOp.SUM
        output = args[0] if args else kwargs[output_name]
        size = dist.get_world_size(kwargs.get("group"))
        work = fn(*args, **kwargs)
        if work is None:
            output.div_(size)
            return None
        return _AveragedWork(work, lambda: output.div_(size))

    return reduce


def install() -> None:
    """Replace the collectives of `torch.distributed` whose NCCL behaviour gloo lacks."""
    reason = "gloo has no ReduceOp.AVG: a sum, then a division (on CPU)"
    replace(dist, "all_reduce", _averaging(dist.all_reduce, "tensor"), reason)
    replace(dist, "reduce_scatter_tensor", _averaging(dist.reduce_scatter_tensor, "output"), reason)
    gather = dist.all_gather_into_tensor

    @functools.wraps(gather)
    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(
            output_tensor, input_tensor.reshape(1) if input_tensor.dim() == 0 else input_tensor, *args, **kwargs
        )

    replace(dist, "all_gather_into_tensor", all_gather_into_tensor, "gloo gathers no 0-dim tensors (on CPU)")
