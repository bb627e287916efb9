"""Depth importance by what is lost without a unit: alone, in a contiguous run, or on average over sub-networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models.config import Architecture
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.ablation import Ablation, Outcome
from megatron_ext.pruning.depth import STATIC
from megatron_ext.pruning.shapley import shapley

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How Shapley values are sampled; see `shapley.shapley`."""

    max_samples: int = 16
    tolerance: float = 0.1
    keep: float = 0.0
    seed: int = 0


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
        ablation: The model.
        architecture: The same.
        metric: As in `budget.DEPTH_CHOICES`; nothing is measured for a static one.
        blocks: Whether blocks are to be chosen, or sub-layers.
        run: How long a run a scan leaves out.
        sampling: For Shapley values.
        progress: Called with a line after each evaluation.

    Returns:
        Scores by name, float32. Leaving one out gives all three of its metrics, and for sub-layers and blocks.
    """
    single = [(i,) for i in range(len(architecture.pattern))]
    if metric in STATIC:
        return {}
    if metric.startswith("scan_"):
        units = architecture.layers.blocks if blocks else single
        return _scan(ablation, units, metric.removeprefix("scan_"), blocks=blocks, run=run, progress=progress)
    if metric.startswith("shapley_"):
        units, options = architecture.layers.blocks if blocks else single, sampling or Sampling()
        return _shapley(ablation, units, metric.removeprefix("shapley_"), blocks, options, progress)
    result: dict[str, Tensor] = {}
    for chosen, units in ((False, single), (True, architecture.layers.blocks)):
        outcomes = []
        for place, unit in enumerate(units):
            outcomes.append(ablation.without(unit))
            what = "block" if chosen else "sub-layer"
            progress(f"without {what} {place} of {len(units)}: loss {outcomes[-1].loss:.4f}")
        whole = ablation.whole.loss
        result[names.depth("loss", blocks=chosen)] = torch.tensor([o.loss - whole for o in outcomes])
        result[names.depth("logit_mse", blocks=chosen)] = torch.tensor([o.logit_mse for o in outcomes])
        result[names.depth("logit_distance", blocks=chosen)] = torch.tensor([o.logit_distance for o in outcomes])
    return result


def _scan(
    ablation: Ablation, units: Sequence[Sequence[int]], value: str, *, blocks: bool, run: int, progress: Progress
) -> dict[str, Tensor]:
    lost = []
    for first in range(len(units) - run + 1):
        outcome = ablation.without(i for unit in units[first : first + run] for i in unit)
        lost.append(outcome.loss - ablation.whole.loss if value == "loss" else ablation.whole.task - outcome.task)
        score = f"loss {outcome.loss:.4f}" + (f", task {outcome.task:.4f}" if value == "task" else "")
        progress(f"without {first} to {first + run - 1} of {len(units)}: {score}")
    return {names.scan(value, run, blocks=blocks): torch.tensor(lost)}


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
        lambda gone: worth(ablation.without(i for unit in gone for i in units[unit])),
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
