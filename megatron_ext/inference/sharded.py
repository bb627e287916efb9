"""One model, spread over ranks, that micro-batches are sent through."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.training.forward import forward_pass


@dataclass(frozen=True)
class ShardedModel:
    """A model in evaluation mode, of which each rank holds its part.

    Attributes:
        chunks: This rank's, one for each virtual pipeline stage.
        architecture: The whole model.
        vocab_size: Entries of the vocabulary; what lies beyond is padding, neither generated nor counted.
    """

    chunks: list[HybridModel]
    architecture: Architecture
    vocab_size: int

    @property
    def stages(self) -> int:
        """Pipeline stages, and so micro-batches that keep all of them busy."""
        return mpu.get_pipeline_model_parallel_world_size()

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank, of all that work on the same texts, is the one that tells the others what came out."""
        first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
        return first and mpu.is_pipeline_last_stage(ignore_virtual=True)

    def run[Item, Outcome](
        self,
        items: Sequence[Item],
        shape: tuple[int, int],
        forward: Callable[[HybridModel, Item], Tensor],
        finish: Callable[[HybridModel, Item, Tensor], Outcome],
    ) -> list[Outcome]:
        """Send micro-batches through all pipeline stages.

        Args:
            items: The micro-batches; with virtual stages, a multiple of `stages`.
            shape: Sequences of each, and tokens of each sequence.
            forward: What a chunk does with one.
            finish: From the last chunk's output to what is wanted of it.

        Returns:
            The outcomes in order, on the ranks of the last stage; nothing elsewhere.
        """

        def step(data: Iterator[Item], chunk: HybridModel) -> tuple[Tensor, Callable[..., Outcome]]:
            item = next(data)
            output = forward(chunk, item)
            return output, lambda tensor, non_loss_data: finish(chunk, item, tensor)

        iterators = [iter(items) for _ in self.chunks]
        return forward_pass(step, self.chunks, iterators, len(items), shape, collect=True)

    def from_last_stage(self, value: Tensor) -> Tensor:
        """The last stage's values, on all stages; `value` is replaced."""
        if self.stages > 1:
            source: Any = mpu.get_pipeline_model_parallel_last_rank()
            group: Any = mpu.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(value, source, group=group)
        return value

    @contextmanager
    def no_sequence_parallel(self) -> Iterator[None]:
        """Without sequence parallelism, which needs more than one token at a time.

        Nothing is lost: it saves activations, and one token has few. Experts get each token from every tensor rank and
        answer each of them.
        """
        names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
        owners: dict[int, Any] = {}
        for chunk in self.chunks:
            for module in chunk.modules():
                owners[id(module)] = module
                if (config := getattr(module, "config", None)) is not None:
                    owners[id(config)] = config
        changed = [(owner, name) for owner in owners.values() for name in names if getattr(owner, name, False) is True]
        for owner, name in changed:
            setattr(owner, name, False)
        try:
            yield
        finally:
            for owner, name in changed:
                setattr(owner, name, True)
