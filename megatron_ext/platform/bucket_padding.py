"""Where a distributed optimizer's state lies when it is saved in the form that every layout can read.

Its buffers are padded at the end of each bucket. Megatron gathers them without that padding, and then cuts each
parameter's state out at its place with padding: behind the first bucket that has any, what is saved is shifted. There
are several buckets wherever an embedding is shared between pipeline stages, or `--ddp-bucket-size` is exceeded.
"""

from itertools import accumulate
from typing import Any

from megatron_ext.platform.replacements import replace


def leave_out_padding() -> None:
    """Let the distributed optimizer cut its state out of the gathered buffers where it is."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    cut: Any = DistributedOptimizer.sharded_param_state_fully_reshardable
    if getattr(cut, "leaves_out_padding", False):
        return

    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = without_padding(buffer)
        try:
            return cut(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    sharded_param_state_fully_reshardable.leaves_out_padding = True  # type: ignore[attr-defined]
    reason = "the optimizer's state is saved at its place where buckets are padded (everywhere)"
    replace(
        DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_param_state_fully_reshardable, reason
    )


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Of each parameter of a buffer its first element, the one after its last, and its bucket, without any padding.

    Args:
        buffer: Megatron's `_ParamAndGradBuffer`.
    """
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *accumulate(padding)]
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
