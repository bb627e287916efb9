"""Depth importance by what is lost without a unit: alone, in a contiguous run, or on average over sub-networks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_ext.pruning import scores as names
from megatron_ext.pruning.ablation import Outcome
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, LeaveOut, Scan, Shapley
from megatron_ext.pruning.left_out import LeftOut, Sublayers
from megatron_ext.pruning.shapley import shapley

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ShapleySampling:
    """How Shapley values are sampled; see `shapley.shapley`."""

    max_samples: int = 16
    tolerance: float = 0.1
    keep: float = 0.0
    seed: int = 0


@runtime_checkable
class Outcomes(Protocol):
    """A model of which sub-layers can be left out, such as an `Ablation`."""

    @property
    def whole(self) -> Outcome:
        """The outcome of the whole model."""
        ...

    def outcome(self, units: Iterable[int]) -> Outcome:
        """The outcome without these sub-layers. A collective of all ranks."""
        ...


def measure(
    ablation: Outcomes,
    architecture: Sublayers,
    metric: str,
    *,
    blocks: bool,
    kinds: str = "",
    run: int = 0,
    sampling: ShapleySampling | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Tensor]:
    """The scores that a depth metric asks for beyond the static ones. A collective of all ranks.

    Args:
        ablation: The model; it compares logits if the metric does.
        architecture: The same.
        metric: Of `DEPTH_METRICS`, but for scans of a task; nothing is measured for a `Change`.
        blocks: Whether blocks are to be chosen, or sub-layers; the others are not measured.
        kinds: Of these kinds only, not for scans; by default of all.
        run: How long a run a scan leaves out.
        sampling: For Shapley values.
        progress: Called with a line after each evaluation.

    Returns:
        Scores by name, float32; of all metrics that leave one out, but for those of logits that are not compared.
    """
    asked = DEPTH_METRICS[metric]
    if isinstance(asked, Change):
        return {}
    units, worse = sublayers_of(architecture, blocks, kinds), asked.worse
    assert worse is not None, "a task is asked in `scan_task`"
    if isinstance(asked, Scan):

        def lost(gone: Sequence[int]) -> float:
            outcome = ablation.outcome(gone)
            progress(f"without sub-layers {min(gone)} to {max(gone)}: loss {outcome.loss:.4f}")
            return worse(outcome) - worse(ablation.whole)

        return {names.scan(metric, run, blocks=blocks): _scan(units, run, lost)}
    if isinstance(asked, Shapley):
        options = sampling or ShapleySampling()
        details = _shapley(ablation, units, worse, options, progress)
        return {
            name + detail: part
            for detail, values in details.items()
            for name, part in _named(architecture, metric, values, blocks, kinds).items()
        }
    outcomes = []
    for place, unit in enumerate(units):
        outcomes.append(ablation.outcome(unit))
        progress(f"without {'block' if blocks else 'sub-layer'} {place} of {len(units)}: loss {outcomes[-1].loss:.4f}")
    result: dict[str, Tensor] = {}
    for name, other in DEPTH_METRICS.items():
        if isinstance(other, LeaveOut) and (asked.logits or not other.logits):
            whole = other.worse(ablation.whole)
            values = torch.tensor([other.worse(outcome) - whole for outcome in outcomes])
            result |= _named(architecture, name, values, blocks, kinds)
    return result


def scan_task(
    model: LeftOut,
    architecture: Sublayers,
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

    return {names.scan("scan_task", run, blocks=blocks): _scan(sublayers_of(architecture, blocks), run, lost)}


def sublayers_of(architecture: Sublayers, blocks: bool, kinds: str = "") -> Sequence[Sequence[int]]:
    """The sub-layers of each block, or each sub-layer, of these kinds or of all."""
    if blocks:
        return architecture.layers.blocks
    return [(i,) for i, kind in enumerate(architecture.pattern) if kind in (kinds or architecture.pattern)]


def _named(architecture: Sublayers, metric: str, values: Tensor, blocks: bool, kinds: str) -> dict[str, Tensor]:
    """The values of `sublayers_of` by the names of their scores."""
    if not kinds:
        return {names.depth(metric, blocks=blocks): values}
    own = [architecture.pattern[i] for (i,) in sublayers_of(architecture, blocks, kinds)]
    places = {kind: [place for place, each in enumerate(own) if each == kind] for kind in kinds}
    return {names.depth(metric, kind=kind): values[place] for kind, place in places.items()}


def _scan(units: Sequence[Sequence[int]], run: int, lost: Callable[[Sequence[int]], float]) -> Tensor:
    firsts = range(len(units) - run + 1)
    return torch.tensor([lost([i for unit in units[first : first + run] for i in unit]) for first in firsts])


def _shapley(
    ablation: Outcomes,
    units: Sequence[Sequence[int]],
    worse: Callable[[Outcome], float],
    sampling: ShapleySampling,
    progress: Progress,
) -> dict[str, Tensor]:
    """The values, and with what their names end in, what else is known of them."""
    found = shapley(
        lambda gone: -worse(ablation.outcome(i for unit in gone for i in units[unit])),
        range(len(units)),
        seed=sampling.seed, max_samples=sampling.max_samples, tolerance=sampling.tolerance, keep=sampling.keep,
        progress=lambda samples, width: progress(f"{samples} samples: widest 95% interval +-{width:.4g}"),
    )  # fmt: skip
    return {
        "": torch.tensor(found.values),
        names.STDERR: torch.tensor(found.errors),
        names.INTERVAL: torch.tensor(found.intervals),
    }
