"""Depth importance by what is lost without a unit: alone, in a contiguous run, or on average over sub-networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models.config import Architecture
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.ablation import Ablation, Outcome
from megatron_ext.pruning.depth import STATIC
from megatron_ext.pruning.left_out import LeftOut
from megatron_ext.pruning.shapley import shapley

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How Shapley values are sampled; see `shapley.shapley`."""

    max_samples: int = 16
    tolerance: float = 0.1
    keep: float = 0.0
    seed: int = 0


def compares_logits(metric: str) -> bool:
    """Whether a depth metric needs logits (`Ablation`), or only losses."""
    return "logit" in metric


def measure(
    ablation: Ablation,
    architecture: Architecture,
    metric: str,
    *,
    blocks: bool,
    run: int = 0,
    sampling: Sampling | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Tensor]:
    """The scores that a depth metric asks for beyond the static ones. A collective of all ranks.

    Args:
        ablation: The model; it compares logits if the metric does.
        architecture: The same.
        metric: As in `budget.DEPTH_CHOICES`, but for `scan_task`; nothing is measured for a static one.
        blocks: Whether blocks are to be chosen, or sub-layers; the others are not measured.
        run: How long a run a scan leaves out.
        sampling: For Shapley values.
        progress: Called with a line after each evaluation.

    Returns:
        Scores by name, float32; with logits, of all three metrics that leave one out.
    """
    if metric in STATIC:
        return {}
    units = units_of(architecture, blocks)
    if metric == "scan_loss":

        def lost(gone: Sequence[int]) -> float:
            outcome = ablation.outcome(gone)
            progress(f"without sub-layers {min(gone)} to {max(gone)}: loss {outcome.loss:.4f}")
            return outcome.loss - ablation.whole.loss

        return {names.scan("loss", run, blocks=blocks): _scan(units, run, lost)}
    if metric.startswith("shapley_"):
        options = sampling or Sampling()
        return _shapley(ablation, units, metric.removeprefix("shapley_"), blocks, options, progress)
    outcomes = []
    for place, unit in enumerate(units):
        outcomes.append(ablation.outcome(unit))
        progress(f"without {'block' if blocks else 'sub-layer'} {place} of {len(units)}: loss {outcomes[-1].loss:.4f}")
    whole = ablation.whole.loss
    result = {names.depth("loss", blocks=blocks): torch.tensor([o.loss - whole for o in outcomes])}
    if compares_logits(metric):
        result[names.depth("logit_mse", blocks=blocks)] = torch.tensor([o.logit_mse for o in outcomes])
        result[names.depth("logit_distance", blocks=blocks)] = torch.tensor([o.logit_distance for o in outcomes])
    return result


def scan_task(
    model: LeftOut,
    architecture: Architecture,
    judge: Callable[[], float],
    whole: float,
    *,
    blocks: bool,
    run: int,
    progress: Progress = lambda line: None,
) -> dict[str, Tensor]:
    """What each run of sub-layers, or blocks, is worth in a task's score. A collective of all ranks.

    Args:
        model: The model.
        architecture: The same.
        judge: The task's score, the higher the better, of whatever the model is at the moment.
        whole: The whole model's score.
        blocks: Whether blocks are to be chosen, or sub-layers.
        run: How many of them go together.
        progress: Called with a line after each evaluation.
    """

    def lost(gone: Sequence[int]) -> float:
        with model.without(gone):
            score = judge()
        progress(f"without sub-layers {min(gone)} to {max(gone)}: task {score:.4f}, of {whole:.4f}")
        return whole - score

    return {names.scan("task", run, blocks=blocks): _scan(units_of(architecture, blocks), run, lost)}


def units_of(architecture: Architecture, blocks: bool) -> Sequence[Sequence[int]]:
    """The sub-layers of each block, or each sub-layer."""
    return architecture.layers.blocks if blocks else [(i,) for i in range(len(architecture.pattern))]


def _scan(units: Sequence[Sequence[int]], run: int, lost: Callable[[Sequence[int]], float]) -> Tensor:
    firsts = range(len(units) - run + 1)
    return torch.tensor([lost([i for unit in units[first : first + run] for i in unit]) for first in firsts])


def _shapley(
    ablation: Ablation,
    units: Sequence[Sequence[int]],
    value: str,
    blocks: bool,
    sampling: Sampling,
    progress: Progress,
) -> dict[str, Tensor]:
    worth: Callable[[Outcome], float] = lambda outcome: -getattr(outcome, value)  # noqa: E731
    found = shapley(
        lambda gone: worth(ablation.outcome(i for unit in gone for i in units[unit])),
        range(len(units)),
        seed=sampling.seed, max_samples=sampling.max_samples, tolerance=sampling.tolerance, keep=sampling.keep,
        progress=lambda samples, width: progress(f"{samples} samples: widest 95% interval +-{width:.4g}"),
    )  # fmt: skip
    name = names.depth(f"shapley_{value}", blocks=blocks)
    return {
        name: torch.tensor(found.values),
        name + names.STDERR: torch.tensor(found.errors),
        name + names.INTERVAL: torch.tensor(found.intervals),
    }
