"""A model with the caches of a batch: tokens go in, the logits of the next ones come out.

On a GPU steps of one token are a CUDA graph from the third on, because a layer's few small kernels take less time than
Python takes to start them. What a graph cannot hold runs as ever: several ranks of one model, experts, and attention
that is not ours.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import parallel_state as mpu
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_ext.inference.sharded import ShardedModel
from megatron_ext.ops import dispatch
from megatron_ext.ops.cached_attention import naive
from megatron_ext.platform.attention_cache import CacheSlot, cache_slot
from megatron_ext.platform.device import device_type
from megatron_ext.platform.transformer_engine import TorchDotProductAttention

logger = logging.getLogger(__name__)
WARM_UP = 2  # steps before the graph, in which kernels are compiled and chosen


@dataclass(frozen=True)
class _Batch:
    """A micro-batch in flight: its caches, and the tokens it goes through with next."""

    context: StaticInferenceContext
    tokens: Int[Tensor, "b s"]
    positions: Int[Tensor, "b s"]


class CachedModel:
    """A model and the caches of one batch, in as many micro-batches as there are pipeline stages."""

    def __init__(self, model: ShardedModel, rows: int, length: int, pieces: int | None = None) -> None:
        """Make caches, empty.

        Args:
            model: The model.
            rows: Sequences of each micro-batch.
            length: Tokens that the caches hold.
            pieces: Micro-batches, by default one for each pipeline stage.
        """
        self._model = model
        self.contexts = [StaticInferenceContext(rows, length) for _ in range(pieces or model.stages)]
        self._step = Step(model, self.contexts[0], rows) if can_be_graphed(model) else None

    def next_logits(self, tokens: Int[Tensor, "n s"], start: int, stop: int) -> Float[Tensor, "n v"] | None:
        """Send the tokens from `start` to `stop` through the model.

        Returns:
            The logits of the next token, on the last stage; the next call may write over them.
        """
        if self._step is not None and start > 0 and stop - start == 1:
            found = [self._step(tokens[:, start:stop], start)]
        else:
            found = self._through_all_stages(tokens, start, stop)
        for context in self.contexts:
            context.increment_sequence_len_offset(stop - start)
            context.enable_decode_mode()
        return torch.cat(found)[:, : self._model.vocab_size] if found else None

    def _through_all_stages(self, tokens: Int[Tensor, "n s"], start: int, stop: int) -> list[Float[Tensor, "b v"]]:
        rows = self.contexts[0].max_batch_size
        positions = torch.arange(start, stop, device=tokens.device)[None].expand(rows, -1)
        batches = [
            _Batch(context, own[:, start:stop], positions)
            for context, own in zip(self.contexts, tokens.split(rows), strict=True)
        ]

        def forward(chunk: Any, batch: _Batch) -> Tensor:
            return chunk(
                batch.tokens, batch.positions, None, inference_context=batch.context, runtime_gather_output=True
            )  # fmt: skip

        return self._model.run(
            batches, (rows, stop - start), forward, lambda chunk, batch, logits: logits[:, -1].float()
        )


def can_be_graphed(model: ShardedModel) -> bool:
    """Whether a step of one token depends on nothing that the host knows.

    Experts do: each gets as many tokens as chose it.
    """
    alone = mpu.get_tensor_model_parallel_world_size() == 1 and model.stages == len(model.chunks) == 1
    attention = [module.core_attention for module in model.chunks[0].modules() if hasattr(module, "core_attention")]
    ours = all(isinstance(each, TorchDotProductAttention) and each.is_plain for each in attention)
    return device_type() == "cuda" and alone and ours and not model.architecture.num_experts and dispatch.triton_runs()


class Step:
    """One more token of a batch, whose caches hold at least one: told by tensors where it is, and so a graph."""

    def __init__(self, model: ShardedModel, context: StaticInferenceContext, rows: int) -> None:
        device, on_gpu = torch.cuda.current_device(), device_type() == "cuda"
        self._chunk, self._context = model.chunks[0], context
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        attend = naive.attend
        if on_gpu:
            from megatron_ext.ops.cached_attention import triton

            attend = triton.attend
        self._slot = CacheSlot(self._position, attend)
        self._steps_to_graph: int | None = WARM_UP if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, tokens: Int[Tensor, "b 1"], position: int) -> Float[Tensor, "b v"]:
        """The logits of the next token."""
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        if self._steps_to_graph == 0:
            self._capture()
        if self._graph is not None and self._logits is not None:
            self._graph.replay()
            return self._logits
        if self._steps_to_graph is not None:
            self._steps_to_graph -= 1
        return self._forward()

    def _forward(self) -> Float[Tensor, "b v"]:
        positions = self._position[None].expand(len(self._tokens), 1)
        with cache_slot(self._slot):
            logits = self._chunk(
                self._tokens, positions, None, inference_context=self._context, runtime_gather_output=True
            )
        return logits[:, -1].float()

    def _capture(self) -> None:
        """Make the graph; where that cannot be done, steps go on as before it."""
        self._steps_to_graph = None
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do, such as NCCL's watchdog, is no part of it.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward()
        except RuntimeError as error:  # what a layer does that a graph may not
            logger.warning("generation without a CUDA graph, which could not be made: %s", error)
            return
        self._graph = graph
