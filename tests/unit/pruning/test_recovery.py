"""A plan with something in place of what it drops: kept on disk, checked, and said in words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import PlanError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning import recovery
from megatron_ext.pruning.emulation import Emulator
from megatron_ext.pruning.fitting import Fitting, spans
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.recovery import FILE, Recovery, table
from megatron_ext.pruning.report import recovery_lines

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="M-*-*-", hidden_size=8, padded_vocab_size=16)
DROPPED, RANK = (2, 3, 5), 2


def emulators(joint: bool = False) -> dict[int, Emulator]:
    generator, explained = torch.Generator().manual_seed(1), torch.linspace(0, 0.8, 9, dtype=torch.float64)
    return {
        first: Emulator(
            torch.randn(8, generator=generator), torch.randn(RANK, 8, generator=generator),
            torch.randn(8, RANK, generator=generator), 0.25, 0.5, explained,
        )
        for first in spans(DROPPED, joint)
    }  # fmt: skip


def plan(joint: bool = False, **changes: Any) -> Plan:
    kept = tuple(i for i in range(6) if i not in DROPPED)
    bare = Plan(source=ARCH, target=replace(ARCH, pattern="M-*"), units=kept)
    how = Recovery(**{"method": "low-rank", "into": "units", "rank": RANK, "samples": 4, "tokens": 100} | changes)
    return bare.recovered(spans(DROPPED, joint), how, emulators(joint))


def test_a_plan_and_its_tensors_are_saved_and_loaded_exactly(tmp_path: Path) -> None:
    made = plan()
    assert made.target.pattern == "M-LL*L"
    made.save(tmp_path / "plan.json")
    recovery.write(made.emulators, tmp_path / FILE)
    found = Plan.load(tmp_path / "plan.json")
    assert found == made
    assert found.fingerprint == made.fingerprint == replace(made, emulators={}, provenance=Plan.provenance).fingerprint
    for first, own in made.emulators.items():
        other = found.emulators[first]
        for name in ("bias", "down", "up", "explained"):
            assert torch.equal(getattr(other, name), getattr(own, name))
        assert (other.size, other.mean) == (own.size, own.mean)
    assert plan(joint=True).target.pattern == "M-L*L"


def test_a_plan_without_one_says_nothing_of_it() -> None:
    values = Plan.keep_everything(ARCH).to_dict()
    assert "recovery" not in values
    assert "emulated" not in values


def test_tensors_that_are_not_the_plans_are_refused(tmp_path: Path) -> None:
    made = plan()
    made.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")
    other = {first: replace(own, bias=own.bias + 1) for first, own in made.emulators.items()}
    recovery.write(other, tmp_path / FILE)
    with pytest.raises(PlanError, match="not its own"):
        Plan.load(tmp_path / "plan.json")
    # A plan of which nothing is known takes what lies there, if it fits and is whole.
    replace(made, provenance=Plan.provenance).save(tmp_path / "plan.json")
    assert torch.equal(Plan.load(tmp_path / "plan.json").emulators[2].bias, other[2].bias)
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (b"", b"{}", whole[:100], whole[:-8], whole.replace(b"2.bias", b"9.bias")):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(PlanError, match="damaged"):
            Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no tensors for sub-layer 3"):
        recovery.added(replace(made, emulators={2: made.emulators[2]}), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emulated": {}}, "or neither"),
        ({"recovery": None}, "or neither"),
        ({"emulated": {"2": [2, 3], "3": [3], "5": [5]}}, "dropped ones right after"),
        ({"emulated": {"1": [1], "2": [2]}}, "dropped ones right after"),
        ({"emulated": {"2": [2, 4]}}, "dropped ones right after"),
        ({"emulated": {"2": [2]}}, "does not make the target"),
        ({"recovery": {"method": "magic", "into": "units"}}, "is not known"),
        ({"recovery": {"method": "bias", "into": "units", "more": 1}}, "is damaged"),
        ({"recovery": {"method": "bias", "into": "units", "rank": -1}}, "no such rank"),
        ({"recovery": {"method": "low-rank", "into": "biases", "rank": 2}}, "only a bias"),
        ({"recovery": {"method": "bias", "into": "biases"}}, "does not make the target|a bias has no place"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    values = json.loads(json.dumps(plan().to_dict())) | changes
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(values)


def test_one_plan_has_one_recovery() -> None:
    made = plan()
    with pytest.raises(PlanError, match="already"):
        made.recovered({2: (2,)}, Recovery("bias", "units"))
    with pytest.raises(PlanError, match="a plan of its own"):
        made.then(Plan.keep_everything(made.target))


def test_linear_sublayers_have_one_rank() -> None:
    """What is added to a model that has some is padded to their rank, or refused."""
    source = replace(ARCH, pattern="M-L*", linear_rank=3)
    bare = Plan(source=source, target=replace(source, pattern="M-L"), units=(0, 1, 2))
    small = bare.recovered({3: (3,)}, Recovery("bias", "units"), {3: Emulator(torch.ones(8))})
    assert small.target.linear_rank == 3
    added = recovery.added(small, torch.float32)
    assert added["recovery.3.up"].shape == (8, 3)
    assert not added["recovery.3.up"].any()
    with pytest.raises(PlanError, match="one rank"):
        bare.recovered({3: (3,)}, Recovery("low-rank", "units", 4))


def test_the_table_says_which_can_be_emulated() -> None:
    rows = table(ARCH.pattern, spans(DROPPED, joint=True), emulators(joint=True))
    assert rows[0] == ["sub-layer", "", "update / stream", "mean", "rank 1", "rank 4", "full rank"]
    assert rows[1] == ["2 to 3", "*-", "0.25", "50.0%", "10.0%", "40.0%", "80.0%"]
    assert rows[2][:2] == ["5", "MLP"]
    few, many = (recovery_lines(plan(tokens=tokens)) for tokens in (100, 1000))
    assert any("flatters" in line for line in few)
    assert not any("flatters" in line for line in many)


def test_moments_are_seen_as_many_at_a_time_as_fit() -> None:
    one = 2 * 8 * 64**2
    assert Fitting(4, memory=3 * one).at_a_time(64) == 3
    assert Fitting(4, stream="clean", memory=3 * one).passes(7, 64) == 3
    assert Fitting(4, memory=1).at_a_time(64) == 1
    assert Fitting(4, stream="pruned", memory=3 * one).passes(7, 64) == 7
