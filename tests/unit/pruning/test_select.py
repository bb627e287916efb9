import json
import math
from dataclasses import replace

import pytest
import torch
from random_models import random_scores

from megatron_ext.errors import PlanError
from megatron_ext.models.cost import Workload, memory_bytes
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.select import make_plan, top

ARCH = PRESETS["tiny-hybrid"].architecture


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
    plan = make_plan(random_scores(ARCH, **{"depth.block_influence.blocks": influence}), ARCH, Targets(num_layers=4))
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


def test_whole_groups_go_by_the_norm_of_their_heads():
    scores = random_scores(ARCH)
    plan = make_plan(
        scores, ARCH, Targets(num_query_groups=1, mamba_num_groups=1, mamba_state_dim=8, mamba_num_heads=4)
    )
    sizes = {"num_query_groups": 1, "num_attention_heads": 4, "mamba_num_groups": 1, "mamba_num_heads": 4}
    assert plan.target == replace(ARCH, **sizes, mamba_state_dim=8)
    assert plan.query_heads == {}  # all heads of the group that stays
    for i, kind in enumerate(ARCH.pattern):
        if kind == "*":
            heads = scores[f"layers.{i}.query_head"].tolist()
            norms = [sum(v**2 for v in heads[:4]), sum(v**2 for v in heads[4:])]
            assert plan.kv_groups[i] == highest(norms, 1)
        elif kind == "M":
            heads = scores[f"layers.{i}.mamba"].square().sum(1).tolist()
            (group,) = plan.mamba_groups[i]
            assert (group,) == highest([sum(heads[:8]), sum(heads[8:])], 1)
            assert plan.mamba_heads[i] == tuple(8 * group + h for h in highest(heads[8 * group : 8 * group + 8], 4))
            states = scores[f"layers.{i}.state"][group].tolist()
            assert plan.states[i] == tuple(32 * group + n for n in highest(states, 8))


def test_states_stay_in_equal_numbers_in_every_group():
    scores = random_scores(ARCH)
    plan = make_plan(scores, ARCH, Targets(mamba_state_dim=8))
    own = scores["layers.0.state"].tolist()
    assert plan.states[0] == highest(own[0], 8) + tuple(32 + n for n in highest(own[1], 8))


def test_widths_are_spread_over_the_layers_by_importance():
    """An MLP whose neurons are all alike needs many of them; one that has a few strong ones does not."""
    flat, peaked = torch.linspace(1, 0.9, 512), torch.cat([torch.full((64,), 100.0), torch.full((448,), 1e-3)])
    changes = {f"layers.{i}.ffn": peaked if i == 3 else flat for i in ARCH.layers.indices("-")}
    targets = Targets(ffn_hidden_size=256, mamba_num_heads=8, per_layer=("ffn_hidden_size", "mamba_num_heads"))
    plan = make_plan(random_scores(ARCH, **changes), ARCH, targets)
    widths = plan.target.layer_sizes["ffn_hidden_size"]
    assert sum(widths) == 6 * 256
    assert widths[1] == 64
    assert all(width % 8 == 0 and width > 64 for place, width in enumerate(widths) if place != 1)
    assert plan.ffn[3] == tuple(range(64))
    heads = plan.target.layer_sizes["mamba_num_heads"]
    assert sum(heads) == 4 * 8
    assert all(h % 2 == 0 for h in heads)
    assert [len(plan.mamba_heads.get(i, range(16))) for i in ARCH.layers.indices("M")] == list(heads)


def test_the_dropped_query_head_next_in_rank_is_folded_into_the_last_that_stays():
    heads = torch.tensor([8.0, 5, 7, 6, 1, 2, 3, 4])
    plan = make_plan(
        random_scores(ARCH, **{"layers.4.query_head": heads}), ARCH, Targets(num_attention_heads=6), merge_heads=True
    )
    assert plan.query_heads[4] == (0, 2, 3, 5, 6, 7)
    assert plan.merged_heads[4] == ((3, 1), (5, 4))  # ranks 3 and 4 of each group of 4
    few = make_plan(
        random_scores(ARCH, **{"layers.4.query_head": heads}), ARCH, Targets(num_attention_heads=2), merge_heads=True
    )
    assert few.merged_heads[4] == ((0, 2), (7, 6))  # one stays of four: only rank 2 is folded in


@pytest.mark.parametrize("name", ["tiny-hybrid", "mamba2-hybrid-8b", "llama3.1-8b"])
def test_a_memory_budget_counts_weights_and_caches(name):
    arch, load = PRESETS[name].architecture, Workload(batch=2, context=1024)
    budget = 0.6 * memory_bytes(arch, load)
    plan = make_plan(random_scores(arch), arch, Targets(memory=budget, workload=load))
    assert 0.95 * budget <= memory_bytes(plan.target, load) <= budget


def test_divisors_decide_what_budgets_find():
    scores = random_scores(ARCH)
    plan = make_plan(scores, ARCH, Targets(params=0.5, hidden_divisor=64, ffn_divisor=48, mamba_heads_divisor=4))
    target = plan.target
    assert (target.hidden_size % 64, target.ffn_hidden_size % 48, target.mamba_num_heads % 4) == (0, 0, 0)
    big = PRESETS["llama3.1-8b"].architecture
    target = make_plan(random_scores(big), big, Targets(params=0.5)).target
    assert (target.hidden_size % 64, target.ffn_hidden_size % 64) == (0, 0)


EXPERTS = replace(
    ARCH, pattern="M-*EE", num_experts=6, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=32,
    moe_router_topk=3,
)  # fmt: skip


def test_experts_and_each_ones_own_neurons_are_chosen():
    scores = random_scores(EXPERTS)
    sizes = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 8}
    plan = make_plan(scores, EXPERTS, Targets(**sizes))
    assert plan.target == replace(EXPERTS, **sizes)
    for i in (3, 4):
        experts = highest(scores[f"layers.{i}.expert"].tolist(), 4)
        neurons = scores[f"layers.{i}.expert_ffn"].tolist()
        assert plan.experts[i] == experts
        assert plan.expert_ffn[i] == tuple(e * 64 + n for e in experts for n in highest(neurons[e], 24))
        assert plan.shared_ffn[i] == highest(scores[f"layers.{i}.shared_ffn"].tolist(), 8)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    only_neurons = make_plan(scores, EXPERTS, Targets(moe_ffn_hidden_size=24))
    assert only_neurons.experts == {}
    assert len(only_neurons.expert_ffn[3]) == 6 * 24


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"num_experts": 2}, "3 to 6, as many as a token needs or more"),
        ({"moe_ffn_hidden_size": 65}, "1 to 64"),
    ],
)
def test_sizes_of_experts_that_cannot_be_are_refused(targets, message):
    with pytest.raises(PlanError, match=message):
        make_plan(random_scores(EXPERTS), EXPERTS, Targets(**targets))
    with pytest.raises(PlanError, match="no such layer"):
        Targets(**targets).check(ARCH)


def test_layers_keep_equally_many_experts_and_experts_equally_many_neurons():
    plan = make_plan(random_scores(EXPERTS), EXPERTS, Targets(num_experts=4))
    with pytest.raises(PlanError, match="layers keep different numbers"):
        replace(plan, experts=plan.experts | {4: (0, 1, 2)})
    plan = make_plan(random_scores(EXPERTS), EXPERTS, Targets(moe_ffn_hidden_size=1))
    with pytest.raises(PlanError, match="the groups keep different numbers"):
        replace(plan, expert_ffn=plan.expert_ffn | {4: (0, 1, 64, 128, 192, 256)})


def test_depth_may_take_all_mixtures_away():
    plan = make_plan(random_scores(EXPERTS), EXPERTS, Targets(moe_layers=0))
    assert plan.target == replace(EXPERTS, pattern="M-*")
    assert plan.target.num_experts == 0


@pytest.mark.parametrize("fraction", [0.75, 0.5])
def test_a_budget_narrows_experts_and_keeps_their_number(fraction):
    plan = make_plan(random_scores(EXPERTS), EXPERTS, Targets(params=fraction, embedding=False))
    ratio = plan.target.num_parameters(embedding=False) / EXPERTS.num_parameters(embedding=False)
    assert 0.95 * fraction <= ratio <= fraction
    assert plan.target.moe_ffn_hidden_size < 64
    assert plan.target.num_experts == 6


def test_targets_are_reached_in_equal_steps():
    """The last step is the target itself; groups stay equal; what divides both ends divides what is between."""
    targets = Targets(
        hidden_size=64, num_attention_heads=2, num_query_groups=1, mamba_num_heads=8, attention_layers=0.5, mlp_layers=2
    )
    steps = [targets.toward(ARCH, share) for share in (0.5, 1.0)]
    assert steps[1].sizes == targets.sizes
    assert steps[1].kinds(ARCH) == targets.kinds(ARCH)
    half = steps[0]
    half.check(ARCH)
    assert half.hidden_size == (256 + 64) // 2
    assert half.num_query_groups is not None
    assert half.num_attention_heads is not None
    assert half.num_attention_heads % half.num_query_groups == 0
    assert half.mlp_layers == math.ceil((ARCH.pattern.count("-") + 2) / 2)
    params = Targets(params=0.5).toward(ARCH, 0.5).params
    assert params == pytest.approx(0.75 * ARCH.num_parameters(), abs=1)


def test_a_scan_that_tells_no_run_from_another_is_refused():
    """A task that the model fails without any of them would have the first layers go."""
    blocks = len(ARCH.layers.blocks)
    targets = Targets(num_layers=blocks - 2, depth_metric="scan_task")
    same = random_scores(ARCH, **{"depth.scan_task.blocks.2": torch.full((blocks - 1,), 0.25)})
    with pytest.raises(PlanError, match="tells no run from another") as error:
        make_plan(same, ARCH, targets)
    assert "costs 0.25" in str(error.value)


def test_a_layer_that_never_did_anything_takes_part_in_sharing_out():
    """Its shares are 0 of 0, which are no reason to keep it whole."""
    sizes = dict.fromkeys(ARCH.layers.indices("-"), torch.rand(512))
    dead = ARCH.layers.indices("-")[1]
    scores = {f"layers.{i}.ffn": value for i, value in sizes.items()} | {f"layers.{dead}.ffn": torch.zeros(512)}
    plan = make_plan(
        random_scores(ARCH, **scores), ARCH,
        Targets(ffn_hidden_size=256, per_layer=("ffn_hidden_size",), ffn_divisor=16),
    )  # fmt: skip
    kept = plan.target.layer_sizes["ffn_hidden_size"]
    assert kept[1] == min(kept) == 16
    assert sum(kept) == 256 * len(kept)
