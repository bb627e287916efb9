import json
from dataclasses import replace

import pytest
import torch

from megatron_ext.errors import PlanError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores, shapes
from megatron_ext.pruning.select import make_plan, top

ARCH = PRESETS["tiny-hybrid"].architecture


def random_scores(arch, **changes) -> Scores:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes(arch).items()}
    return Scores(values=values | changes, architecture=arch, model="run", iteration=3, seed=5)


def highest(scores, keep):
    """An independent top-k: sort by falling score, then rising index."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]))


def test_top_breaks_ties_by_the_lower_index():
    assert top(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2) == (1, 2)
    assert top(torch.zeros(6), 3) == (0, 1, 2)
    assert top(torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0]), 2, groups=2) == (0, 4)


def test_every_axis_keeps_its_highest_scores():
    scores = random_scores(ARCH)
    sizes = {
        "hidden_size": 128,
        "ffn_hidden_size": 200,
        "num_attention_heads": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
    }
    plan = make_plan(scores, ARCH, Targets(**sizes))
    assert plan.target == replace(ARCH, **sizes)
    assert plan.hidden == highest(scores["hidden"].tolist(), 128)
    for i, kind in enumerate(ARCH.pattern):
        if kind == "-":
            assert plan.ffn[i] == highest(scores[f"layers.{i}.ffn"].tolist(), 200)
        elif kind == "*":
            heads = scores[f"layers.{i}.query_head"].tolist()
            expected = highest(heads[:4], 2) + tuple(4 + h for h in highest(heads[4:], 2))
            assert plan.query_heads[i] == expected
        else:
            s = scores[f"layers.{i}.mamba"].tolist()
            channel = [sum(s[h][d] ** 2 for h in range(16)) ** 0.5 for d in range(32)]
            kept = highest(channel, 16)
            head = [sum(s[h][d] ** 2 for d in kept) ** 0.5 for h in range(16)]
            assert plan.head_channels[i] == kept
            assert plan.mamba_heads[i] == highest(head[:8], 4) + tuple(8 + h for h in highest(head[8:], 4))


def test_the_least_influential_blocks_go():
    influence = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.8, 0.3])
    plan = make_plan(random_scores(ARCH, **{"block_influence.blocks": influence}), ARCH, Targets(num_layers=4))
    assert plan.units == (0, 1, 4, 5, 8, 9, 10, 11)  # blocks 1 and 3 are sub-layers 2, 3 and 6, 7
    assert plan.target == replace(ARCH, pattern="M-*-M-*-")
    assert (plan.hidden, plan.ffn) == (None, {})


@pytest.mark.parametrize(
    "name", ["tiny-hybrid", "tiny-transformer", "tiny-mamba2", "mamba2-hybrid-8b", "mn-minitron-8b"]
)
@pytest.mark.parametrize("fraction", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("embedding", [True, False])
def test_a_budget_is_met_from_below_within_5_percent(name, fraction, embedding):
    arch = PRESETS[name].architecture
    plan = make_plan(random_scores(arch), arch, Targets(params=fraction, embedding=embedding))
    ratio = plan.target.num_parameters(embedding=embedding) / arch.num_parameters(embedding=embedding)
    assert 0.95 * fraction <= ratio <= fraction
    assert plan.target.pattern == arch.pattern
    plan.target.validate(tp=2)


def test_a_budget_is_a_count_and_leaves_what_was_asked_for():
    scores = random_scores(ARCH)
    plan = make_plan(scores, ARCH, Targets(params=2_500_000, hidden_size=192, num_layers=5))
    assert 0.95 * 2_500_000 <= plan.target.num_parameters() <= 2_500_000
    assert plan.target.hidden_size == 192
    assert len(plan.target.layers.blocks) == 5
    assert plan == make_plan(scores, ARCH, Targets(params=2_500_000, hidden_size=192, num_layers=5))


@pytest.mark.parametrize("params", [0.001, 6_000_000])
def test_an_unreachable_budget_says_what_is_reachable(params):
    with pytest.raises(PlanError, match="no plan reaches the target") as error:
        make_plan(random_scores(ARCH), ARCH, Targets(params=params))
    assert f"{ARCH.num_parameters():,}, at most 5% below" in str(error.value)


@pytest.mark.parametrize(
    "targets",
    [{}, {"hidden_size": 512}, {"num_attention_heads": 3}, {"mamba_num_heads": 7}, {"num_layers": 0}, {"params": -1.0}],
)
def test_targets_that_cannot_be_cut_are_refused(targets):
    with pytest.raises(PlanError):
        make_plan(random_scores(ARCH), ARCH, Targets(**targets))


def test_a_target_for_a_missing_kind_of_layer_is_refused():
    arch = PRESETS["tiny-transformer"].architecture
    with pytest.raises(PlanError, match="has no such layer"):
        make_plan(random_scores(arch), arch, Targets(mamba_num_heads=8))


def test_a_plan_is_saved_and_loaded_exactly(tmp_path):
    plan = make_plan(random_scores(ARCH), ARCH, Targets(params=0.5, num_layers=5))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").fingerprint == plan.fingerprint
    assert plan.provenance.model == "run"
    assert plan.fingerprint == replace(plan, provenance=replace(plan.provenance, seed=9)).fingerprint
    assert plan.fingerprint != Plan.keep_everything(ARCH).fingerprint


def test_what_is_not_a_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(path)
    for text, message in (("{", "not JSON"), ("[]", "not a plan"), ('{"format": "megatron_ext.plan/1"}', "damaged")):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [3, 1]}, "ascending"), ({"hidden": [1, 1]}, "ascending"), ({"hidden": [0, 256]}, "out of range"),
        ({"hidden": []}, "nothing is kept"), ({"hidden": [0, 1]}, "does not make the target"),
        ({"query_heads": {"4": [0, 1], "10": [0, 1]}}, "groups keep different numbers"),
        ({"head_channels": {"0": [0, 1]}}, "layers keep different numbers"),
        ({"ffn": {"1": [0, 1]}}, "does not make the target"), ({"states": {"0": [0, 1]}}, "equal numbers in the groups"),
        ({"merged_heads": {"4": [[0, 1]]}}, "a query head that stays"), ({"ffn": {"0": [0, 1]}}, "no such axis"),
        ({"units": [0, 1]}, "does not make the target"),
    ],
)  # fmt: skip
def test_a_plan_edited_by_hand_is_checked(change, message):
    values = json.loads(json.dumps(Plan.keep_everything(ARCH).to_dict()))
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(values | change)


def test_a_plan_or_scores_of_another_model_are_refused():
    other = replace(ARCH, ffn_hidden_size=640)
    with pytest.raises(PlanError, match="another model") as error:
        Plan.keep_everything(ARCH).check(other)
    assert "ffn_hidden_size=640 instead of 512" in str(error.value)
    Plan.keep_everything(ARCH).check(replace(ARCH, max_position_embeddings=8192))
    with pytest.raises(PlanError, match="another model"):
        make_plan(random_scores(ARCH), other, Targets(params=0.5))
