"""What a model loses when sub-layers are left out, on any parallel layout, without running the untouched prefix again.

A sub-layer that is left out is the identity on the residual stream. One pass over the calibration data keeps what goes
into the sub-layers; every later evaluation passes over the layers before the first one left out and takes that one's
input from there. The model is loaded once. All of it runs through Megatron's own schedule: a stage before the resume
point hands on a tensor of the right shape, which the resume point then replaces.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary (this rank's part of each).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.models.config import Architecture

GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a model without some sub-layers does, over all calibration tokens.

    Attributes:
        loss: Cross entropy, nats per token.
        logit_mse: `sum ||z' - z||^2 / sum ||z||^2` against the whole model's logits `z`, as Nemotron Elastic normalises
            it (arXiv 2511.16664).
        logit_distance: `||z' - z||_2`, averaged over tokens (arXiv 2407.16286).
        task: Share of the task's samples that are answered right; 0 without a task.
    """

    loss: float
    logit_mse: float
    logit_distance: float
    task: float = 0.0


@dataclass
class _Chunk:
    """One chunk of the model on this rank, with its micro-batches counted."""

    module: Any
    labels: Tensor | None = None
    micro_batch: int = -1
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    final: list[Tensor] = field(default_factory=list)


class Ablation:
    """The model on this rank, of which sub-layers can be left out.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped, in evaluation mode.
        architecture: The whole model.
        run: Runs all calibration micro-batches forward through the schedule, the same ones in the same order each time,
            and gives the mean loss over all ranks.
        tokens: Tokens that one run takes through this rank (its part of each sequence).
        memory: Bytes that kept activations may take on a rank. If the inputs of all its sub-layers do not fit, those of
            every k-th are kept, for the smallest k that fits, and evaluations start from the nearest before.
        run_task: Runs the task's micro-batches forward; their labels are negative where nothing is to be answered.

    What is left behind: wrappers on the layers, which `remove` takes off.
    """

    def __init__(
        self,
        chunks: Iterable[Any],
        architecture: Architecture,
        run: Callable[[], float],
        *,
        tokens: int,
        memory: int = 8 * GIB,
        run_task: Callable[[], float] | None = None,
    ) -> None:
        self.architecture = architecture
        self._run, self._run_task = run, run_task
        self._chunks = [_Chunk(chunk) for chunk in chunks]
        self._groups = self._chunks[0].module.pg_collection
        self._dropped: frozenset[int] = frozenset()
        self._resume = 0
        self._mode = "off"
        self._distances = torch.zeros(4, dtype=torch.float64)
        self._answers = torch.zeros(2, dtype=torch.float64)
        self._undo: list[Callable[[], None]] = []
        self._known: dict[frozenset[int], Outcome] = {}
        self.calls: dict[int, int] = dict.fromkeys(range(len(architecture.pattern)), 0)
        self.stride = self._choose_stride(tokens, memory)
        for chunk in self._chunks:
            self._wrap(chunk)

    @property
    def whole(self) -> Outcome:
        """The outcome of the whole model; the first request runs the base pass. A collective of all ranks."""
        return self.without(())

    def without(self, units: Iterable[int]) -> Outcome:
        """The outcome without these sub-layers, remembered from an earlier request. A collective of all ranks."""
        dropped = frozenset(units)
        if frozenset() not in self._known:
            self._known[frozenset()] = self._measure(frozenset(), "base")
        if dropped not in self._known:
            self._known[dropped] = self._measure(dropped, "ablate")
        return self._known[dropped]

    def remove(self) -> None:
        """Take the wrappers off the model, and free the kept activations."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for chunk in self._chunks:
            chunk.inputs.clear()
            chunk.final.clear()

    def _choose_stride(self, tokens: int, memory: int) -> int:
        """The same on all ranks, for the one that has the most to keep."""
        config = self._chunks[0].module.config
        width = 4 if config.fp32_residual_connection else torch.finfo(config.params_dtype).bits // 8
        share = config.tensor_model_parallel_size if config.sequence_parallel else 1
        each = tokens * config.hidden_size * width // share
        layers = torch.tensor([sum(len(chunk.module.decoder.layers) for chunk in self._chunks)])
        layers = layers.to(torch.cuda.current_device())
        dist.all_reduce(layers, op=dist.ReduceOp.MAX)
        room = max(0, memory // max(each, 1) - 1)  # the input of the output layer is kept too
        none = len(self.architecture.pattern) + 1
        return next((k for k in range(1, int(layers) + 1) if -(-int(layers) // k) <= room), none)

    def _keeps(self, index: int) -> bool:
        return index > 0 and index % self.stride == 0

    def _measure(self, dropped: frozenset[int], mode: str) -> Outcome:
        self._mode, self._dropped = mode, dropped
        first = min(dropped, default=0)
        self._resume = first // self.stride * self.stride if mode == "ablate" else 0
        self._distances.zero_()
        try:
            with torch.no_grad():
                self._restart()
                loss = self._run()
                distances = self._summed(self._distances)
                task = self._measure_task() if self._run_task is not None else 0.0
        finally:
            self._mode, self._dropped = "off", frozenset()
        if mode == "base":
            return Outcome(loss, 0.0, 0.0, task)
        difference, size, norm, count = distances.tolist()
        return Outcome(loss, difference / size, norm / count, task)

    def _measure_task(self) -> float:
        """The task is run from the start: its activations are not kept."""
        assert self._run_task is not None
        self._mode, self._resume = "task", 0
        self._answers.zero_()
        self._restart()
        self._run_task()
        right, count = self._summed(self._answers).tolist()
        return right / count

    def _restart(self) -> None:
        for chunk in self._chunks:
            chunk.micro_batch = -1

    def _summed(self, sums: Tensor) -> Tensor:
        """Over all ranks; tensor-parallel ranks repeat each other, which cancels in every ratio."""
        everywhere = sums.to(torch.cuda.current_device())
        dist.all_reduce(everywhere)
        return everywhere.cpu()

    def _wrap(self, chunk: _Chunk) -> None:
        def begin(_: Any, __: Any, kwargs: Any) -> None:
            if self._mode != "off":
                chunk.micro_batch += 1
                chunk.labels = kwargs.get("labels")

        self._undo.append(chunk.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for layer in chunk.module.decoder.layers:
            self._wrap_layer(chunk, layer)
        if chunk.module.post_process:
            hook = chunk.module.output_layer.register_forward_hook(self._output(chunk), with_kwargs=True)
            self._undo.append(hook.remove)

    def _wrap_layer(self, chunk: _Chunk, layer: Any) -> None:
        from megatron.core.transformer.transformer_layer import TransformerLayer

        index, plain = layer.layer_number - 1, layer.forward
        paired = isinstance(layer, TransformerLayer)  # returns (hidden states, context)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._mode == "base" and self._keeps(index):
                chunk.inputs[index, chunk.micro_batch] = hidden_states.detach()
            if self._mode == "ablate" and self._resume and index == self._resume:
                # A tensor of its own: virtual pipelines empty what they have handed on.
                hidden_states = chunk.inputs[index, chunk.micro_batch].detach()
            if self._mode in ("ablate", "task") and (index < self._resume or index in self._dropped):
                return (hidden_states, None) if paired else hidden_states
            self.calls[index] += 1
            return plain(hidden_states, *args, **kwargs)

        layer.forward = forward
        self._undo.append(lambda: delattr(layer, "forward"))

    def _output(self, chunk: _Chunk) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if self._mode == "base":
                chunk.final.append(args[0].detach())
            elif self._mode == "ablate":
                # The whole model's logits are computed again: kept, they would be as large as all activations.
                whole, _ = module.forward(chunk.final[chunk.micro_batch], *args[1:], **kwargs)
                self._add_distance(output[0], whole)
            elif self._mode == "task":
                assert chunk.labels is not None
                self._add_answers(output[0], chunk.labels)

        return see

    def _add_distance(self, logits: Tensor, whole: Tensor) -> None:
        """Both (s, b, v)."""
        squares = torch.stack([(logits.float() - whole.float()).square().sum(-1), whole.float().square().sum(-1)])
        if self._groups.tp.size() > 1:
            dist.all_reduce(squares, group=self._groups.tp)
        squares = squares.double().cpu()
        self._distances += torch.stack(
            [squares[0].sum(), squares[1].sum(), squares[0].sqrt().sum(), torch.tensor(float(squares[0].numel()))]
        )

    def _add_answers(self, logits: Tensor, labels: Tensor) -> None:
        """Whether the argmax of `logits` (s, b, v) is the label (b, s) wherever that is not negative."""
        best, place = logits.float().max(dim=-1)
        place += self._groups.tp.rank() * logits.shape[-1]
        if self._groups.tp.size() > 1:
            highest = best.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._groups.tp)
            place[best < highest] = torch.iinfo(place.dtype).max
            dist.all_reduce(place, op=dist.ReduceOp.MIN, group=self._groups.tp)  # of equals the first, as argmax
        asked = labels >= 0
        counts = torch.stack([(asked & (place.mT != labels)).sum(1), asked.sum(1)])
        if self._groups.cp.size() > 1:
            dist.all_reduce(counts, group=self._groups.cp)
        wrong, answers = counts.cpu()
        real = answers > 0  # samples that fill the last micro-batch ask for nothing
        self._answers += torch.tensor([(real & (wrong == 0)).sum(), real.sum()], dtype=torch.float64)
