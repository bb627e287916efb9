"""How fast a model reads and writes: tokens per second of prefill and decode, at a length of context."""

import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.inference.utils import InferenceMode

from megatron_ext.errors import ConfigError
from megatron_ext.inference.cached import CachedModel
from megatron_ext.inference.sharded import ShardedModel

WARM, STEPS = 4, 16  # tokens that are decoded before the clock runs, and while it does


@torch.no_grad()
def speed(model: ShardedModel, length: int, batch_size: int) -> dict[str, float]:
    """Read a context of random tokens, the second time by the clock, and write more of it.

    Args:
        model: The model.
        length: Tokens of the context of each sequence.
        batch_size: Sequences on each data-parallel rank; pipeline stages have so many in flight together.

    Returns:
        `prefill_tokens_per_second` and `decode_tokens_per_second`, of all ranks together as fast as the slowest, with
        `batch_size` and `ranks`.

    Raises:
        ConfigError: The layout has context parallelism.
    """
    if mpu.get_context_parallel_world_size() > 1:
        raise ConfigError("generation has no context parallelism", legal="tensor, pipeline and data parallelism")
    pieces = model.stages
    rows = -(-batch_size // pieces)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (rows * pieces, length + WARM + STEPS), generator=generator)
    tokens = tokens.to(torch.cuda.current_device())
    with model.no_sequence_parallel(), InferenceMode.active():
        CachedModel(model, rows, length).next_logits(tokens, 0, length)
        cached = CachedModel(model, rows, tokens.shape[1])
        began = _now()
        cached.next_logits(tokens, 0, length)
        prefill = _now() - began
        for position in range(length, length + WARM):
            cached.next_logits(tokens, position, position + 1)
        began = _now()
        for position in range(length + WARM, length + WARM + STEPS):
            cached.next_logits(tokens, position, position + 1)
        decode = _now() - began
    slowest = torch.tensor([prefill, decode], dtype=torch.float64, device=tokens.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    sequences = len(tokens) * mpu.get_data_parallel_world_size()
    return {
        "prefill_tokens_per_second": sequences * length / float(slowest[0]),
        "decode_tokens_per_second": sequences * STEPS / float(slowest[1]),
        "batch_size": sequences,
        "ranks": dist.get_world_size(),
    }


def _now() -> float:
    """Seconds, when all that was asked of the device is done, on all ranks."""
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()
