"""Costs on paper against evaluations that are counted, and the tables of the documentation."""

import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.models.presets import PRESETS
from megatron_ext.models.training_cost import GPUS, Layout
from megatron_ext.pruning import leave_out
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.depth_cost import depth_cost
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import keep_units

ARCH = PRESETS["tiny-hybrid"].architecture
LLAMA = PRESETS["llama3.1-8b"].architecture
PAGE = Path(__file__).parents[3] / "docs" / "prune.md"
NODE = Layout(tp=8, seq_length=8192, sequence_parallel=True)


class Counted:
    """An `Ablation` that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[frozenset[int]] = set()

    def outcome(self, units: Iterable[int]) -> Any:
        gone = frozenset(units)
        self.asked.add(gone)
        loss = sum(1 + (7 * i) % 5 for i in gone) ** 1.2
        return SimpleNamespace(loss=loss, logit_mse=loss, logit_distance=loss)

    @property
    def whole(self) -> Any:
        return self.outcome(())


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("metric", ["block_influence", "loss", "logit_mse", "scan_loss", "shapley_loss"])
def test_evaluations_are_as_many_as_are_run(metric: str, blocks: bool) -> None:
    """Only units that are to be chosen are left out: 32 of 32 layers, where their 64 sub-layers had been, too."""
    counted: Any = Counted()
    sampling = leave_out.ShapleySampling(max_samples=3, tolerance=0.0, keep=0.5)
    leave_out.measure(counted, ARCH, metric, blocks=blocks, run=2, sampling=sampling)
    said = depth_cost(ARCH, metric, 128, NODE, blocks=blocks, run=2, sampling=sampling).evaluations
    units = len(leave_out.sublayers_of(ARCH, blocks))
    exact = {"block_influence": 0, "loss": units + 1, "logit_mse": units + 1, "scan_loss": units}
    if metric in exact:
        assert said == exact[metric] == len(counted.asked)
    else:
        assert len(counted.asked) <= said < 2 * len(counted.asked)


@pytest.mark.parametrize("metric", ["loss", "logit_mse", "shapley_loss"])
def test_of_chosen_kinds_only_those_are_left_out(metric: str) -> None:
    """Their scores have names of their own, and are those of the same sub-layers among all."""
    counted: Any = Counted()
    sampling = leave_out.ShapleySampling(max_samples=2, tolerance=0.0)
    found = leave_out.measure(counted, ARCH, metric, blocks=False, kinds="-*", sampling=sampling)
    cut = {i for i, kind in enumerate(ARCH.pattern) if kind in "-*"}
    assert set().union(*counted.asked) == cut
    said = depth_cost(ARCH, metric, 128, NODE, blocks=False, kinds="-*", sampling=sampling).evaluations
    assert len(counted.asked) <= said <= depth_cost(ARCH, metric, 128, NODE, blocks=False).evaluations
    scores = Scores(values=found, architecture=ARCH)
    assert f"depth.{metric}.attention" in scores.values
    if not metric.startswith("shapley"):
        assert said == len(counted.asked) == len(cut) + 1
        every = leave_out.measure(counted, ARCH, metric, blocks=False)[f"depth.{metric}"]
        for kind in "-*":
            own = scores[names.depth(metric, kind=kind)]
            assert own.tolist() == every[ARCH.layers.indices(kind)].tolist()
        targets = Targets(mlp_layers=2, attention_layers=0, depth_metric=metric)
        by_kind = keep_units(scores, ARCH, targets)
        assert by_kind == keep_units(Scores(values={names.depth(metric): every}, architecture=ARCH), ARCH, targets)
        assert {ARCH.pattern[i] for i in by_kind} == {"M", "-"}
        assert len(by_kind) == ARCH.pattern.count("M") + 2


def test_the_page_says_what_the_model_of_costs_says() -> None:
    """The rows of its table for Llama 3.1 8B on eight GPUs."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    assert [row[0] for row in rows] == ["loss", "logit_mse", "scan_loss", "shapley_loss"]
    for metric, evaluations, minutes, states, least in rows:
        sampling = leave_out.ShapleySampling(keep=0.9)
        cost = depth_cost(LLAMA, metric, 128, NODE, blocks=True, run=16, sampling=sampling)
        assert int(evaluations.replace(",", "")) == cost.evaluations
        assert float(minutes) == pytest.approx(cost.flops / (8 * GPUS["h100"].flops * 0.4) / 60, abs=0.06)
        assert (float(states), float(least)) == pytest.approx((cost.states / 2**30, cost.least / 2**30), abs=0.06)
