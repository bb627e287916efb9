"""What a model loses when sub-layers are left out, on any parallel layout, without running the untouched prefix again.

One pass over the calibration data keeps what goes into the sub-layers; every later evaluation passes over the layers
before the first one left out and takes that one's input from there. The model is loaded once. All of it runs through
Megatron's own schedule: a stage before the resume point hands on a tensor of the right shape, which the resume point
then replaces.

That is the floor where every sub-layer's input is kept (stride 1). Of L sub-layers the evaluation without the i-th runs
the L - i - 1 after it, and the output layer; all evaluations together run L (L - 1) / 2 sub-layers and L output layers,
half of what whole passes would. `benchmarks/leave_one_out.py` measures how far they are from it.

Where logits are compared, the states that the whole model's logits are made of are kept, too. If there is no room for
them, each evaluation runs the whole model again, some micro-batches at a time, right before the smaller one.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary (this rank's part of each).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.lm_head.logit_distance import squared_distances
from megatron_ext.lm_head.softcap import softcapped
from megatron_ext.models.architecture import Architecture
from megatron_ext.pruning.left_out import LeftOut

GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a model without some sub-layers does, over all calibration tokens.

    Attributes:
        loss: Cross entropy, nats per token.
        logit_mse: `sum ||z' - z||^2 / sum ||z||^2` against the whole model's logits `z`, as Nemotron Elastic normalises
            it (arXiv 2511.16664). 0 if logits are not compared.
        logit_distance: `||z' - z||_2`, averaged over tokens (arXiv 2407.16286). 0 if logits are not compared.
    """

    loss: float
    logit_mse: float = 0.0
    logit_distance: float = 0.0


@dataclass(frozen=True)
class Passes:
    """Forward passes over the calibration data.

    Attributes:
        run: Runs this rank's micro-batches from the first number up to the second through the schedule, the same ones
            each time; gives the sum of the losses and the number of tokens, over all ranks.
        micro_batches: How many there are.
        tokens: Of a micro-batch that go through this rank (its part of each sequence).
        step: Micro-batches that the schedule takes at a time, or multiples of it.
    """

    run: Callable[[int, int], tuple[float, float]]
    micro_batches: int
    tokens: int
    step: int = 1


class Ablation(LeftOut):
    """The model on this rank, of which sub-layers can be left out.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped, in evaluation mode.
        architecture: The whole model.
        passes: Run the data.
        memory: Bytes that kept activations may take on a rank. If the inputs of all its sub-layers do not fit, those of
            every k-th are kept, for the smallest k that fits, and evaluations start from the nearest before. If not
            even what the comparison of logits needs fits, the whole model is run anew for as many micro-batches at a
            time as do fit, one at least.
        logits: Whether logits are compared with the whole model's; otherwise only losses are measured.

    Attributes:
        stride: k; as many as there are sub-layers if no input is kept.
        at_a_time: Micro-batches of a pass.

    What is left behind: wrappers and hooks on the model, which `remove` takes off.
    """

    def __init__(
        self,
        chunks: Iterable[Any],
        architecture: Architecture,
        passes: Passes,
        *,
        memory: int = 8 * GIB,
        logits: bool = False,
    ) -> None:
        super().__init__(chunks, architecture)
        self._data, self._logits = passes, logits
        self._groups = self._chunks[0].pg_collection
        self._mode = "off"
        self._resume = 0
        self._micro_batch = {id(chunk): -1 for chunk in self._chunks}
        self._inputs: dict[tuple[int, int], Tensor] = {}  # of a sub-layer, in a micro-batch
        self._final: list[Tensor] = []  # what the whole model's logits are made of, by micro-batch
        self._distances = torch.zeros(4, dtype=torch.float64)
        self._known: dict[frozenset[int], Outcome] = {}
        self.stride, self.at_a_time = self._plan_memory(memory)
        for chunk in self._chunks:
            self._undo.append(chunk.register_forward_pre_hook(self._count).remove)
            if logits and chunk.post_process:
                hook = chunk.output_layer.register_forward_hook(self._output(chunk))
                self._undo.append(hook.remove)

    @property
    def whole(self) -> Outcome:
        """The outcome of the whole model; the first request runs the base pass. A collective of all ranks."""
        return self.outcome(())

    def outcome(self, units: Iterable[int]) -> Outcome:
        """The outcome without these sub-layers, remembered from an earlier request. A collective of all ranks."""
        dropped = frozenset(units)
        if frozenset() not in self._known:
            self._known[frozenset()] = self._measure_whole()
        if dropped not in self._known:
            self._known[dropped] = self._measure(dropped)
        return self._known[dropped]

    def remove(self) -> None:
        """Take the wrappers off the model, and free the kept activations."""
        super().remove()
        self._inputs.clear()
        self._final.clear()

    def _plan_memory(self, memory: int) -> tuple[int, int]:
        """Stride and micro-batches at a time, the same on all ranks, for the one that has the most to keep."""
        config, count = self._chunks[0].config, self._data.micro_batches
        width = 4 if config.fp32_residual_connection else torch.finfo(config.params_dtype).bits // 8
        share = config.tensor_model_parallel_size if config.sequence_parallel else 1
        room = memory // max(self._data.tokens * config.hidden_size * width // share, 1)  # states of micro-batches
        own = [layer.layer_number - 1 for chunk in self._chunks for layer in chunk.decoder.layers]
        final = int(self._logits and any(chunk.post_process for chunk in self._chunks))
        none = len(self.architecture.pattern)
        kept = [final + sum(_keeps(index, stride) for index in own) for stride in range(1, none + 1)]
        most = torch.tensor(kept, device=torch.cuda.current_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for stride, states in enumerate(most.tolist(), start=1):
            if states * count <= room:
                return stride, count
        step = self._data.step
        return none, min(count, max(1, room // step) * step)

    def _measure_whole(self) -> Outcome:
        """The base pass, which keeps what there is room for."""
        keeps = self.at_a_time == self._data.micro_batches
        total, count = self._run("base" if keeps else "off", 0, self._data.micro_batches)
        return Outcome(total / count)

    def _measure(self, dropped: frozenset[int]) -> Outcome:
        first = min(dropped)
        self._resume = first // self.stride * self.stride
        self._distances.zero_()
        total = count = 0.0
        for begin in range(0, self._data.micro_batches, self.at_a_time):
            end = min(begin + self.at_a_time, self._data.micro_batches)
            if self.at_a_time < self._data.micro_batches:
                self._final.clear()
                self._run("base", begin, end)
            with self.without(dropped):
                some, tokens = self._run("ablate", begin, end)
            total, count = total + some, count + tokens
        if not self._logits:
            return Outcome(total / count)
        everywhere = self._distances.to(torch.cuda.current_device())
        dist.all_reduce(everywhere)  # tensor-parallel ranks repeat each other, which cancels in every ratio
        difference, size, norm, compared = everywhere.tolist()
        return Outcome(total / count, difference / size, norm / compared)

    def _run(self, mode: str, begin: int, end: int) -> tuple[float, float]:
        self._mode = mode
        self._micro_batch = dict.fromkeys(self._micro_batch, -1)
        try:
            with torch.no_grad():
                return self._data.run(begin, end)
        finally:
            self._mode = "off"

    def _count(self, chunk: Any, _: Any) -> None:
        self._micro_batch[id(chunk)] += 1

    def _enter(self, chunk: Any, index: int, hidden_states: Tensor) -> Tensor:
        place = index, self._micro_batch[id(chunk)]
        if self._mode == "base" and _keeps(index, self.stride):
            self._inputs[place] = hidden_states.detach()
        if self._mode == "ablate" and self._resume and index == self._resume:
            # A tensor of its own: virtual pipelines empty what they have handed on.
            return self._inputs[place].detach()
        return hidden_states

    def _passes(self, index: int) -> bool:
        return super()._passes(index) or (self._mode == "ablate" and index < self._resume)

    def _output(self, chunk: Any) -> Callable[..., None]:
        def see(module: Any, args: Any, output: Any) -> None:
            if self._mode == "base":
                self._final.append(args[0].detach())
            elif self._mode == "ablate":
                self._add_distance(chunk, output[0], self._final[self._micro_batch[id(chunk)]])

        return see

    def _add_distance(self, chunk: Any, logits: Tensor, whole: Tensor) -> None:
        """Compare logits (s, b, v) with those that the whole model's last states make."""
        from megatron_ext.lm_head.hidden_states import head

        other = head(chunk, whole)
        squares = squared_distances(softcapped(logits, other.softcap), other, self._groups.tp).double().cpu()
        self._distances += torch.stack(
            [squares[0].sum(), squares[1].sum(), squares[0].sqrt().sum(), torch.tensor(float(squares[0].numel()))]
        )


def _keeps(index: int, stride: int) -> bool:
    return index > 0 and index % stride == 0
