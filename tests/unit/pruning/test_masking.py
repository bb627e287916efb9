"""Whatever a plan keeps, the sliced model computes what the masked one does, in float64 and plain formulas."""

from dataclasses import replace
from random import Random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_scores, random_weights

from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.stream import tensors
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.reference import forward
from megatron_ext.pruning.apply import apply, compile_moves
from megatron_ext.pruning.budget import SIZES, Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.select import make_plan

ARCH = Architecture(
    pattern="M*-E", hidden_size=12, padded_vocab_size=16, max_position_embeddings=8, ffn_hidden_size=10,
    num_attention_heads=6, num_query_groups=2, kv_channels=4, mamba_num_heads=6, mamba_head_dim=4, mamba_state_dim=4,
    mamba_num_groups=2, num_experts=5, moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=4, moe_router_topk=2,
)  # fmt: skip
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
ROUTERS = [
    {}, {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5}, SIGMOID,
    SIGMOID | {"moe_router_topk": 1, "moe_shared_expert_intermediate_size": 0},
]  # fmt: skip
TOKENS = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(1))


class InMemory:
    """Weights that are read like a checkpoint's."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights
        self.entries = {key: TensorEntry(tuple(value.shape), value.dtype) for key, value in weights.items()}

    def fill(self, key: str, place: torch.Tensor, rows: tuple[int, int] | None = None) -> None:
        place.copy_(self._weights[key])

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> None:
        """None that are bytes on disk."""


def sliced(plan: Plan, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    source = InMemory(weights)
    return {key: made.clone() for key, made in tensors(compile_moves(plan, source.entries), source)}


def masked(plan: Plan) -> dict[int, KeptIndices]:
    """What stays of each sub-layer that does."""
    return {i: plan.kept(i) for i in plan.units}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan for a small random pattern that cuts any subset of the axes, evenly or layer by layer."""
    arch = replace(ARCH, pattern=draw(st.text("M*-E", min_size=1, max_size=5)), **draw(st.sampled_from(ROUTERS)))
    kv, ssm = draw(st.sampled_from([None, 1, 2])), draw(st.sampled_from([None, 1, 2]))
    sizes: dict[str, Any] = {"num_query_groups": kv, "mamba_num_groups": ssm}
    choices = {
        "hidden_size": [4, 8, 12], "ffn_hidden_size": [1, 5, 8], "mamba_head_dim": [1, 3, 4], "mamba_state_dim": [1, 3],
        "num_attention_heads": [heads * (kv or 2) for heads in (1, 2, 3)],
        "mamba_num_heads": [heads * (ssm or 2) for heads in (1, 2, 3)],
        "num_experts": [2, 4, 5], "moe_ffn_hidden_size": [1, 4], "moe_shared_expert_intermediate_size": [1, 3],
    }  # fmt: skip
    for name, legal in choices.items():
        sizes[name] = draw(st.sampled_from([None, *legal]))
    kinds = {"ffn": "-", "mamba": "M", "num_attention": "*", "num_query": "*", "moe": "E", "num_experts": "E"}
    for start, kind in kinds.items():
        if kind not in arch.pattern:
            sizes = {size: None if size.startswith(start) else value for size, value in sizes.items()}
    if not arch.moe_shared_expert_intermediate_size:
        sizes["moe_shared_expert_intermediate_size"] = None
    blocks = draw(st.integers(1, len(arch.layers.blocks)))
    spread = ("ffn_hidden_size",) if sizes["ffn_hidden_size"] and draw(st.booleans()) else ()
    targets = Targets(**sizes, num_layers=blocks, per_layer=spread, ffn_divisor=1)
    scores = random_scores(arch)
    order = Random(draw(st.integers(0, 9)))
    for value in scores.values.values():
        value[...] = torch.tensor([order.random() for _ in range(value.numel())]).view(value.shape)
    return make_plan(scores, arch, targets)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(plans())
def test_a_sliced_model_is_the_masked_one(plan: Plan) -> None:
    weights = random_weights(plan.source)
    small = sliced(plan, weights)
    assert {key: tuple(value.shape) for key, value in small.items()} == axes.tensors(plan.target)
    expected, _ = forward(plan.source, weights, TOKENS, kept=masked(plan))
    logits, _ = forward(plan.target, small, TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans(), st.data())
def test_two_plans_one_after_the_other_are_one(first: Plan, data: st.DataObject) -> None:
    arch = first.target
    sizes: dict[str, Any] = {"hidden_size": data.draw(st.integers(1, arch.hidden_size))}
    if "-" in arch.pattern:
        sizes["ffn_hidden_size"] = data.draw(st.integers(1, min(arch.layer_sizes.get("ffn_hidden_size", [1]))))
    if "*" in arch.pattern and arch.num_query_groups == 2:
        sizes["num_query_groups"] = 1
    if "M" in arch.pattern:
        sizes["mamba_num_heads"] = sizes["mamba_num_groups"] = 1
        sizes["mamba_state_dim"] = data.draw(st.integers(1, arch.mamba_state_dim))
    if "E" in arch.pattern:
        sizes["num_experts"] = arch.moe_router_topk
    blocks = data.draw(st.integers(1, len(arch.layers.blocks)))
    second = make_plan(random_scores(arch), arch, Targets(**sizes, num_layers=blocks))
    weights = random_weights(first.source)
    once, twice = sliced(first.then(second), weights), sliced(second, sliced(first, weights))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_the_cases_cut_every_axis() -> None:
    """What the strategy above draws from reaches each size; otherwise it would prove less than it says."""
    sizes: dict[str, Any] = {"hidden_size": 4, "ffn_hidden_size": 1, "num_query_groups": 1, "num_attention_heads": 1}
    sizes |= {"mamba_num_groups": 1, "mamba_num_heads": 1, "mamba_head_dim": 1, "mamba_state_dim": 1}
    sizes |= {"num_experts": 2, "moe_ffn_hidden_size": 1, "moe_shared_expert_intermediate_size": 1}
    assert set(sizes) == set(SIZES)
    plan = make_plan(random_scores(ARCH), ARCH, Targets(**sizes))
    weights = random_weights(ARCH)
    expected, _ = forward(ARCH, weights, TOKENS, kept=masked(plan))
    logits, _ = forward(plan.target, sliced(plan, weights), TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    whole, _ = forward(ARCH, weights, TOKENS)
    assert (whole - expected).abs().max() > 0.1


def test_merging_equal_heads_changes_nothing() -> None:
    """A dropped head that equals the one that takes it in: 2 h - h = h."""
    plan = make_plan(random_scores(ARCH), ARCH, Targets(num_attention_heads=4), merge_heads=True)
    weights = random_weights(ARCH)
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    heads = weights[key].view(2, 5, 4, 12)  # per group: three query heads, key, value
    assert len(plan.merged_heads[1]) == 2
    for kept, dropped in plan.merged_heads[1]:
        heads[dropped // 3, dropped % 3] = heads[kept // 3, kept % 3]
    plain = replace(plan, merged_heads={})
    merged, unmerged = sliced(plan, weights), sliced(plain, weights)
    assert all(torch.equal(merged[name], unmerged[name]) for name in merged)


def test_a_merged_head_is_twice_itself_minus_the_dropped_one(tmp_path) -> None:
    arch = replace(ARCH, add_qkv_bias=True)
    plan = make_plan(random_scores(arch), arch, Targets(num_attention_heads=4), merge_heads=True)
    weights = random_weights(arch)
    with writing(tmp_path / "source", arch) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    reader = CheckpointReader(apply(plan, tmp_path / "source", tmp_path / "out"))
    for name in ("weight", "bias"):
        key = f"decoder.layers.1.self_attention.linear_qkv.{name}"
        heads, result = weights[key].view(2, 5, 4, -1), reader.read(key).view(2, 4, 4, -1)
        for kept, dropped in plan.merged_heads[1]:
            group = kept // 3
            place = [head for head in plan.query_heads[1] if head // 3 == group].index(kept)
            expected = 2 * heads[group, kept % 3] - heads[group, dropped % 3]
            torch.testing.assert_close(result[group, place], expected)
        assert torch.equal(result[:, 2:], heads[:, 3:])  # keys and values are as they were
