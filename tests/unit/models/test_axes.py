from dataclasses import replace

import pytest
import torch

from megatron_ext.checkpoint.stream import take
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes, cost
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.presets import PRESETS

ARCH = replace(
    PRESETS["tiny-hybrid"].architecture,
    pattern="M-*", hidden_size=24, padded_vocab_size=64, ffn_hidden_size=10, num_attention_heads=6, num_query_groups=2,
    kv_channels=4, mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip


def test_keys_and_shapes_are_megatrons():
    """As read from checkpoints that megatron-core 0.19.2 saved at TP=1 and TP=2."""
    assert axes.tensors(ARCH) == {
        "embedding.word_embeddings.weight": (64, 24),
        "decoder.layers.0.mixer.in_proj.layer_norm_weight": (24,),
        "decoder.layers.0.mixer.in_proj.weight.z": (32, 24),
        "decoder.layers.0.mixer.in_proj.weight.x": (32, 24),
        "decoder.layers.0.mixer.in_proj.weight.B": (32, 24),
        "decoder.layers.0.mixer.in_proj.weight.C": (32, 24),
        "decoder.layers.0.mixer.in_proj.weight.dt": (4, 24),
        "decoder.layers.0.mixer.conv1d.weight.x": (32, 1, 4),
        "decoder.layers.0.mixer.conv1d.weight.B": (32, 1, 4),
        "decoder.layers.0.mixer.conv1d.weight.C": (32, 1, 4),
        "decoder.layers.0.mixer.conv1d.bias.x": (32,),
        "decoder.layers.0.mixer.conv1d.bias.B": (32,),
        "decoder.layers.0.mixer.conv1d.bias.C": (32,),
        "decoder.layers.0.mixer.dt_bias": (4,),
        "decoder.layers.0.mixer.A_log": (4,),
        "decoder.layers.0.mixer.D": (4,),
        "decoder.layers.0.mixer.norm.weight": (32,),
        "decoder.layers.0.mixer.out_proj.weight": (24, 32),
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": (24,),
        "decoder.layers.1.mlp.linear_fc1.weight": (20, 24),
        "decoder.layers.1.mlp.linear_fc2.weight": (24, 10),
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight": (24,),
        "decoder.layers.2.self_attention.linear_qkv.weight": (40, 24),
        "decoder.layers.2.self_attention.linear_proj.weight": (24, 24),
        "decoder.final_norm.weight": (24,),
        "output_layer.weight": (64, 24),
    }


def test_biases_exist_where_asked_for():
    biased = replace(ARCH, normalization="LayerNorm", add_bias_linear=True, untie_embeddings_and_output_weights=False)
    extra = set(axes.tensors(biased)) - set(axes.tensors(ARCH))
    assert {key.removeprefix("decoder.") for key in extra} == {
        "layers.0.mixer.in_proj.layer_norm_bias", "layers.1.mlp.linear_fc1.layer_norm_bias",
        "layers.1.mlp.linear_fc1.bias", "layers.1.mlp.linear_fc2.bias",
        "layers.2.self_attention.linear_qkv.layer_norm_bias", "layers.2.self_attention.linear_qkv.bias",
        "layers.2.self_attention.linear_proj.bias", "final_norm.bias",
    }  # fmt: skip
    assert set(axes.tensors(ARCH)) - set(axes.tensors(biased)) == {"output_layer.weight"}


def test_a_linear_sublayer_is_whole_on_every_rank():
    linear = replace(ARCH, pattern="L*", linear_rank=5)
    shapes = axes.tensors(linear)
    own = {key: shape for key, shape in shapes.items() if "layers.0" in key}
    assert own == {"decoder.layers.0.down": (5, 24), "decoder.layers.0.up": (24, 5), "decoder.layers.0.bias": (24,)}
    assert all(axes.size(linear, key, tp=2) == axes.size(linear, key) for key in own)
    assert "decoder.layers.0.down" not in axes.tensors(replace(linear, linear_rank=0))
    found = {key: axes.indices(linear, key, KeptIndices(hidden=(1, 4))) for key in own}
    assert [[None if i is None else i.tolist() for i in each] for each in found.values()] == [
        [None, [1, 4]], [[1, 4], None], [[1, 4]]
    ]  # fmt: skip


def cut(key: str, tensor: torch.Tensor, kept: KeptIndices) -> torch.Tensor:
    for dimension, index in enumerate(axes.indices(ARCH, key, kept)):
        if index is not None:
            tensor = tensor.index_select(dimension, index)
    return tensor


def numbered(key: str) -> torch.Tensor:
    return torch.arange(axes.size(ARCH, key)).view(axes.shape(ARCH, key))


def test_gate_and_up_are_cut_alike():
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    weight = numbered(key)
    gate, up = weight[:10], weight[10:]
    expected = torch.cat([gate[[1, 4]], up[[1, 4]]])[:, [0, 5]]
    assert torch.equal(cut(key, weight, KeptIndices(hidden=(0, 5), ffn=(1, 4))), expected)


def test_qkv_keeps_keys_and_values_of_every_group():
    key = "decoder.layers.2.self_attention.linear_qkv.weight"
    weight = numbered(key)
    heads = weight.view(10, 4, 24)  # q0 q1 q2 k v | q3 q4 q5 k v
    expected = heads[[2, 3, 4, 5, 8, 9]].reshape(-1, 24)
    assert torch.equal(cut(key, weight, KeptIndices(query_heads=(2, 3))), expected)
    key = "decoder.layers.2.self_attention.linear_proj.weight"
    weight = numbered(key)
    assert torch.equal(cut(key, weight, KeptIndices(query_heads=(2, 3))), weight[:, 8:16])


def test_mamba_heads_and_channels():
    kept = KeptIndices(hidden=(3, 7), mamba_heads=(1, 2), head_channels=(0, 6))
    inner = [head * 8 + channel for head in (1, 2) for channel in (0, 6)]
    for key, expected in {
        "in_proj.weight.x": lambda w: w[inner][:, [3, 7]],
        "in_proj.weight.B": lambda w: w[:, [3, 7]],
        "in_proj.weight.dt": lambda w: w[[1, 2]][:, [3, 7]],
        "conv1d.weight.x": lambda w: w[inner],
        "conv1d.bias.C": lambda w: w,
        "A_log": lambda w: w[[1, 2]],
        "norm.weight": lambda w: w[inner],
        "out_proj.weight": lambda w: w[[3, 7]][:, inner],
    }.items():
        key = f"decoder.layers.0.mixer.{key}"
        assert torch.equal(cut(key, numbered(key), kept), expected(numbered(key))), key


def test_keeping_everything_cuts_nothing():
    for key in axes.keys(ARCH):
        assert set(axes.indices(ARCH, key, KeptIndices())) == {None}


def test_unknown_keys_are_refused():
    for key in ("decoder.layers.9.mixer.D", "decoder.layers.1.mixer.D", "decoder.layers.1.mlp.linear_fc1.bias", "x"):
        with pytest.raises(CheckpointError, match="no weight"):
            axes.locate(ARCH, key)


def test_parameters_per_rank_add_up():
    tied = replace(PRESETS["tiny-hybrid"].architecture)
    assert cost.parameters_per_rank(tied) == [tied.num_parameters()]
    table = tied.padded_vocab_size * tied.hidden_size
    assert sum(cost.parameters_per_rank(tied, pp=2)) == tied.num_parameters() + table  # the last stage holds a copy
    norms = (len(tied.pattern) + 1) * tied.hidden_size  # norms are whole on every rank, the rest is split
    assert cost.parameters_per_rank(tied, tp=2) == [(tied.num_parameters() - norms) // 2 + norms]


def test_whole_groups_take_their_heads_and_states_along():
    qkv = numbered("decoder.layers.2.self_attention.linear_qkv.weight").view(10, 4, 24)  # q0 q1 q2 k v | q3 q4 q5 k v
    key = "decoder.layers.2.self_attention.linear_qkv.weight"
    assert torch.equal(cut(key, numbered(key), KeptIndices(kv_groups=(1,))), qkv[5:].reshape(-1, 24))
    one_head = KeptIndices(kv_groups=(1,), query_heads=(4,))
    assert torch.equal(cut(key, numbered(key), one_head), qkv[[6, 8, 9]].reshape(-1, 24))
    key = "decoder.layers.2.self_attention.linear_proj.weight"
    assert torch.equal(cut(key, numbered(key), KeptIndices(kv_groups=(1,))), numbered(key)[:, 12:])
    rows_of = {"in_proj.weight.B": range(16, 32), "in_proj.weight.dt": (2, 3), "norm.weight": range(16, 32)}
    for name, rows in rows_of.items():
        key = f"decoder.layers.0.mixer.{name}"
        assert torch.equal(cut(key, numbered(key), KeptIndices(mamba_groups=(1,))), numbered(key)[list(rows)]), key


def test_states_are_rows_of_b_and_c():
    states = (0, 5, 17, 30)
    for name in ("in_proj.weight.B", "in_proj.weight.C", "conv1d.weight.C", "conv1d.bias.B"):
        key = f"decoder.layers.0.mixer.{name}"
        assert torch.equal(cut(key, numbered(key), KeptIndices(states=states)), numbered(key)[list(states)]), key
    key = "decoder.layers.0.mixer.in_proj.weight.x"
    assert torch.equal(cut(key, numbered(key), KeptIndices(states=states)), numbered(key))


EXPERTS = replace(
    ARCH, pattern="E", num_experts=4, moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=10,
    moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
)  # fmt: skip


def test_a_mixture_of_experts_is_one_tensor_over_the_experts():
    """As Megatron saves it, whatever its expert parallelism."""
    prefix = "decoder.layers.0."
    shapes = {k.removeprefix(prefix): v for k, v in axes.tensors(EXPERTS).items() if k.startswith(prefix)}
    assert shapes == {
        "pre_mlp_layernorm.weight": (24,),
        "mlp.router.weight": (4, 24),
        "mlp.router.expert_bias": (4,),
        "mlp.experts.experts.linear_fc1.weight": (4, 12, 24),
        "mlp.experts.experts.linear_fc2.weight": (4, 24, 6),
        "mlp.shared_experts.linear_fc1.weight": (20, 24),
        "mlp.shared_experts.linear_fc2.weight": (24, 10),
    }
    biased = replace(EXPERTS, add_bias_linear=True, moe_shared_expert_intermediate_size=0)
    extra = {key.removeprefix(prefix): shape for key, shape in axes.tensors(biased).items() if key.endswith("bias")}
    assert extra == {
        "mlp.router.bias": (4,), "mlp.router.expert_bias": (4,),
        "mlp.experts.experts.linear_fc1.bias": (4, 12), "mlp.experts.experts.linear_fc2.bias": (4, 24),
    }  # fmt: skip


def test_each_expert_keeps_its_own_neurons():
    def cut_expert(name: str, kept: KeptIndices) -> tuple[torch.Tensor, torch.Tensor]:
        key = f"decoder.layers.0.mlp.{name}"
        weight = torch.arange(axes.size(EXPERTS, key)).view(axes.shape(EXPERTS, key))
        result = weight
        for dimension, index in enumerate(axes.indices(EXPERTS, key, kept)):
            if index is not None:
                result = take(result, dimension, index)
        return weight, result

    kept = KeptIndices(hidden=(2, 5, 7), experts=(1, 3), expert_ffn=(6 + 0, 6 + 4, 18 + 2, 18 + 3))
    weight, result = cut_expert("experts.experts.linear_fc1.weight", kept)
    rows = {1: [0, 4, 6, 10], 3: [2, 3, 8, 9]}  # gate, then up
    assert torch.equal(result, torch.stack([weight[e][rows[e]][:, [2, 5, 7]] for e in (1, 3)]))
    weight, result = cut_expert("experts.experts.linear_fc2.weight", kept)
    columns = {1: [0, 4], 3: [2, 3]}
    assert torch.equal(result, torch.stack([weight[e][[2, 5, 7]][:, columns[e]] for e in (1, 3)]))
    weight, result = cut_expert("router.weight", kept)
    assert torch.equal(result, weight[[1, 3]][:, [2, 5, 7]])
    weight, result = cut_expert("experts.experts.linear_fc1.weight", KeptIndices(experts=(0, 2)))
    assert torch.equal(result, weight[[0, 2]])
    weight, result = cut_expert("shared_experts.linear_fc1.weight", KeptIndices(shared_ffn=(1, 9)))
    assert torch.equal(result, weight[[1, 9, 11, 19]])


def test_experts_are_split_over_their_own_ranks():
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    assert axes.size(EXPERTS, key) == 4 * 12 * 24
    assert axes.size(EXPERTS, key, ep=2, etp=1, tp=2) == 2 * 12 * 24
    assert axes.size(EXPERTS, key, ep=2, etp=3) == 2 * 4 * 24
    assert axes.size(EXPERTS, "decoder.layers.0.mlp.router.weight", ep=2, tp=2) == 4 * 24
    whole = sum(cost.parameters_per_rank(EXPERTS))
    assert cost.parameters_per_rank(EXPERTS, ep=4) == [whole - EXPERTS.num_expert_parameters() * 3 // 4]
