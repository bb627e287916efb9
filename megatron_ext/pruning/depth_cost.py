"""What leaving layers out costs, on paper: evaluations, operations, and the memory that lets nothing run twice.

Counted with the cost model of training (`megatron_ext.models.training_cost`); nothing of it is measured. All are upper
bounds: an evaluation that starts from kept activations, or that lacks layers, takes less than a whole forward pass.
"""

from dataclasses import dataclass
from math import ceil

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.training_cost import Layout, forward_flops_per_token
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, DepthMetric, Scan, Shapley
from megatron_ext.pruning.leave_out import ShapleySampling, sublayers_of


@dataclass(frozen=True)
class DepthCost:
    """What a depth metric costs at most.

    Attributes:
        evaluations: Of the model without some layers, and one of the whole.
        flops: Of all of them.
        states: Bytes of a rank that the inputs of all its sub-layers take, and what logits are made of, if they are
            compared: with as much, no layer before the first one left out runs again.
        least: Of these, what logits are made of; with less, the whole model runs again in every evaluation.
    """

    evaluations: int
    flops: float
    states: int
    least: int


def depth_cost(
    arch: Architecture, metric: str, samples: int, layout: Layout, *, blocks: bool, kinds: str = "",
    run: int = 0, sampling: ShapleySampling | None = None,
) -> DepthCost:  # fmt: skip
    """The cost of a depth metric of `DEPTH_METRICS` on calibration sequences (a task's are its own).

    Args:
        arch: The model.
        metric: The metric; a `Change` costs nothing.
        samples: Sequences of each evaluation.
        layout: How many tokens a sequence has, and how they and the layers are divided over ranks.
        blocks: Whether blocks are left out, or sub-layers.
        kinds: Of these kinds only; by default of all.
        run: How long a run a scan leaves out.
        sampling: For Shapley values.
    """
    asked = DEPTH_METRICS[metric]
    if isinstance(asked, Change):
        return DepthCost(0, 0.0, 0, 0)
    evaluations = 1 + _without(asked, len(sublayers_of(arch, blocks, kinds)), run, sampling or ShapleySampling())
    flops = evaluations * samples * layout.seq_length * forward_flops_per_token(arch, layout.seq_length)
    tokens = samples // layout.dp * layout.seq_length // layout.cp
    state = tokens * arch.hidden_size * layout.width // (layout.tp if layout.sequence_parallel else 1)
    least = state if asked.logits else 0
    return DepthCost(evaluations, flops, ceil(len(arch.pattern) / layout.pp) * state + least, least)


def _without(metric: DepthMetric, units: int, run: int, sampling: ShapleySampling) -> int:
    if isinstance(metric, Scan):
        return units - run + 1
    if not isinstance(metric, Shapley):
        return units
    leaving = max(1, units - ceil(round(sampling.keep * units, 6)))
    # A run of players that leave one by one, and the same backwards; both end with all of them gone.
    return sampling.max_samples * ceil(units / leaving) * (2 * leaving - 1)
