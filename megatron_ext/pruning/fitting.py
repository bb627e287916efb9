"""What stands for dropped sub-layers, fitted on calibration data by a model on whatever layout.

On the clean stream the whole model runs, and all of them are seen at once; on the pruned one they are fitted from the
bottom to the top, each on what comes out of the model below, in which those before are replaced already. What is above
the one that is looked at does not run.

Shapes: s sequence (this rank's part), b micro-batch, h hidden.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import Pattern
from megatron_ext.platform.context_parallel import zigzag_split
from megatron_ext.pruning.emulation import Emulator, Moments, fit
from megatron_ext.pruning.left_out import LeftOut
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.recovery import Recovery, no_host
from megatron_ext.reports.progress import Progress
from megatron_ext.training.job import RunConfig


@dataclass(frozen=True)
class Fitting:
    """How they are fitted.

    Attributes:
        rank: Of the maps; 0 for a bias.
        ridge: See `emulation.fit`.
        stream: `clean`, or `pruned`.
        skip: Tokens at the beginning of each sequence that are not counted.
        memory: Bytes of moments that a rank may keep: so many sub-layers are seen at a time.
    """

    rank: int = 0
    ridge: float = 0.0
    stream: Literal["clean", "pruned"] = "clean"
    skip: int = 0
    memory: int = 8 * 2**30

    def at_a_time(self, hidden_size: int) -> int:
        """Sub-layers whose moments fit into the memory, one at least."""
        return max(1, self.memory // Moments.bytes(hidden_size, self.rank > 0))

    def passes(self, count: int, hidden_size: int) -> int:
        """How often the data goes through the model, for so many sub-layers."""
        return count if self.stream == "pruned" else -(-count // self.at_a_time(hidden_size))


def spans(dropped: Iterable[int], joint: bool) -> dict[int, tuple[int, ...]]:
    """The sub-layers that each of those that stand for some stands for, by the first: those in a row, if `joint`."""
    found: dict[int, tuple[int, ...]] = {}
    first = None
    for unit in sorted(dropped):
        if joint and first is not None and found[first][-1] == unit - 1:
            found[first] += (unit,)
        else:
            first, found[unit] = unit, (unit,)
    return found


def check_spans(emulated: Mapping[int, Sequence[int]], pattern: Pattern) -> None:
    """Refuse a pipeline border inside what one map is to stand for: no stage sees both its ends.

    Raises:
        ConfigError: Names the border.
    """
    for units in emulated.values():
        for border in pattern.borders:
            if units[0] < border <= units[-1]:
                raise ConfigError(
                    f"the pipeline border before sub-layer {border} cuts what one map stands for", got=str(pattern),
                    legal=f"no border between sub-layers {units[0]} and {units[-1]}, or no --prune-recover-joint",
                )  # fmt: skip


class EmulatedUpdates(LeftOut):
    """Sub-layers that are watched, or in whose place something else runs.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped, in evaluation mode.
        architecture: The whole model.
        emulated: The sub-layers that are to be replaced, in spans by the first of each.
        skip: Tokens at the beginning of each sequence that are not counted.

    Attributes:
        hidden_size: Of the model.
        emulators: What runs in place of a span, by its first sub-layer.
    """

    def __init__(
        self, chunks: Iterable[Any], architecture: Architecture, emulated: Mapping[int, Sequence[int]], skip: int
    ) -> None:
        self.emulators: dict[int, Emulator] = {}
        self.hidden_size = architecture.hidden_size
        self._emulated, self._skip = emulated, skip
        self._span_of = {unit: first for first, units in emulated.items() for unit in units}
        self._moments: dict[int, Moments] = {}
        self._last = len(architecture.pattern)
        self._inputs: dict[int, Tensor] = {}
        super().__init__(chunks, architecture)
        self._groups: Any = self._chunks[0].pg_collection

    def fit(self, firsts: Sequence[int], fitting: Fitting, run: Callable[[], object]) -> dict[int, Emulator]:
        """What stands for some spans, on all ranks; a collective of them.

        Args:
            firsts: The first sub-layers of the spans.
            fitting: How.
            run: Sends the calibration data through the model.
        """
        found: dict[int, Emulator] = {}
        groups = self._groups
        for first, moments in self.moments(firsts, fitting, run).items():
            if groups.dp.rank() == groups.cp.rank() == groups.tp.rank() == 0:
                found[first] = fit(moments, fitting.rank, fitting.ridge)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        return {first: emulator for part in parts for first, emulator in part.items()}

    def moments(self, firsts: Sequence[int], fitting: Fitting, run: Callable[[], object]) -> dict[int, Moments]:
        """The moments of those spans that this rank's stage has, over all of its ranks; the arguments are `fit`'s."""
        own = {unit - 1 for chunk in self._chunks for unit in (layer.layer_number for layer in chunk.decoder.layers)}
        self._moments = {first: Moments(self.hidden_size, fitting.rank > 0) for first in firsts if first in own}
        self._last = max(self._emulated[first][-1] for first in firsts)
        run()
        groups, found = self._groups, self._moments
        for moments in found.values():
            for name, value in moments.sums.items():
                total = value.to(torch.cuda.current_device())
                for group in (groups.dp, groups.cp, groups.tp):  # without sequence parallelism TP repeats every token
                    dist.all_reduce(total, group=group)
                moments.sums[name] = total
        self._moments, self._last = {}, len(self.architecture.pattern)
        return found

    def _passes(self, index: int) -> bool:
        first = self._span_of.get(index)
        return index > self._last or (first in self.emulators and first != index)

    def _wrap(self, chunk: Any, index: int, layer: Any) -> None:
        from megatron.core.transformer.transformer_layer import TransformerLayer

        super()._wrap(chunk, index, layer)
        within, paired = layer.forward, isinstance(layer, TransformerLayer)
        first = self._span_of.get(index)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first == index and index in self.emulators:
                replaced = hidden_states + self.emulators[index](hidden_states)
                return (replaced, None) if paired else replaced
            if first == index and index in self._moments:
                self._inputs[index] = hidden_states
            output = within(hidden_states, *args, **kwargs)
            if first in self._moments and first is not None and index == self._emulated[first][-1]:
                after = output[0] if isinstance(output, tuple) else output
                self._see(first, self._inputs.pop(first), after, chunk.config.sequence_parallel)
            return output

        layer.forward = forward

    def _see(self, first: int, before: Float[Tensor, "s b h"], after: Float[Tensor, "s b h"], split: bool) -> None:
        """Count a micro-batch, but for the first tokens."""
        before, after = before.detach(), after.detach()
        if self._skip:
            tp, cp = self._groups.tp, self._groups.cp
            length = len(before) * cp.size() * (tp.size() if split else 1)
            own = zigzag_split(torch.arange(length), cp.rank(), cp.size())
            counted = (own.chunk(tp.size())[tp.rank()] if split else own) >= self._skip
            before, after = before[counted.to(before.device)], after[counted.to(after.device)]
        before = before.flatten(0, 1)
        self._moments[first].add(before, after.flatten(0, 1).float() - before.float())


def fit_all(
    watched: EmulatedUpdates,
    emulated: Mapping[int, Sequence[int]],
    fitting: Fitting,
    run: Callable[[], object],
) -> dict[int, Emulator]:
    """What stands for all spans, by the first sub-layer of each, on all ranks; a collective of them.

    Args:
        watched: The model.
        emulated: The spans.
        fitting: How.
        run: Sends the calibration data through the model.
    """
    order = sorted(emulated)
    if fitting.stream == "pruned":
        for first in order:
            watched.emulators |= watched.fit([first], fitting, run)
        return watched.emulators
    step = fitting.at_a_time(watched.hidden_size)
    found: dict[int, Emulator] = {}
    for start in range(0, len(order), step):
        found |= watched.fit(order[start : start + step], fitting, run)
    return found


def recover(run: RunConfig, plan: Plan) -> Plan:
    """The plan with what stands for the sub-layers that it drops, fitted as `--prune-recover` says.

    A collective of all ranks. The model is built on this run's layout and let go.

    Raises:
        ConfigError: The pipeline cuts what one map is to stand for.
        PlanError: Biases have no place where they could go.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training.global_vars import set_args

    from megatron_ext.training.forward import build_model, forward_sums, micro_batches, start

    args, options = run.args, run.options["prune"]
    emulated = spans(set(range(len(plan.source.pattern))) - set(plan.units), options.recover_joint)
    check_spans(emulated, run.pattern)
    fitting, samples = options.fitting, options.recover_samples or options.samples
    into = options.recover_into
    if into is None:
        folds = options.recover == "bias" and not no_host(plan.source, plan.units, emulated)
        into = "biases" if folds else "units"
    how = Recovery(
        options.recover, into, fitting.rank, fitting.ridge, fitting.stream, fitting.skip, samples=samples,
        tokens=samples * (args.seq_length - fitting.skip),
    )  # fmt: skip
    plan.recovered(emulated, how)  # whatever it refuses, before the work
    if not parallel_state.model_parallel_is_initialized():
        start(run)
    set_args(args)
    model = build_model(run)
    batches = micro_batches(run, model, "train", samples)
    steps, watched = samples // args.global_batch_size, EmulatedUpdates(
        unwrap_model(model), run.architecture, emulated, fitting.skip
    )  # fmt: skip
    with Progress("emulation") as shown:
        total = steps * fitting.passes(len(emulated), run.architecture.hidden_size)

        def once() -> None:
            iterators = [iter(own) if own is not None else None for own in batches]
            for _ in range(steps):
                forward_sums(run, model, iterators, get_num_microbatches())
                shown.update(shown.done + 1, total)

        emulators = fit_all(watched, emulated, fitting, once)
    watched.remove()
    return plan.recovered(emulated, how, emulators)
