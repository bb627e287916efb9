from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_models import random_scores, random_weights

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import SIZES, Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.select import make_plan

ARCH = replace(
    PRESETS["tiny-hybrid"].architecture,
    pattern="M-*-M",
    hidden_size=24,
    padded_vocab_size=64,
    ffn_hidden_size=10,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_state_dim=16,
    mamba_num_groups=2,
)
HIDDEN = [0, 3, 4, 9, 20]
PLAN = Plan(
    source=ARCH,
    target=replace(
        ARCH,
        pattern="*-M",
        hidden_size=5,
        ffn_hidden_size=3,
        num_attention_heads=2,
        mamba_num_heads=2,
        mamba_head_dim=3,
    ),
    units=(2, 3, 4),
    hidden=tuple(HIDDEN),
    ffn={3: (1, 4, 9)},
    query_heads={2: (2, 3)},
    mamba_heads={4: (1, 2)},
    head_channels={4: (0, 5, 7)},
)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in axes.tensors(ARCH).items()}


@pytest.fixture
def source(tmp_path, weights):
    with writing(tmp_path / "source", ARCH, Namespace(lr=0.1)) as writer:
        for key, tensor in weights.items():
            writer.write(key, tensor)
    return tmp_path / "source"


def test_keeping_everything_is_the_identity(source, weights, tmp_path):
    reader = CheckpointReader(apply(Plan.keep_everything(ARCH), source, tmp_path / "out"))
    assert list(reader.shapes) == list(weights)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in weights.items())


MIXTURE = replace(ARCH, pattern="M-*E", num_experts=4, moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=8)


@pytest.mark.parametrize("size", [*SIZES, "num_layers", "attention_layers"])
def test_keeping_all_of_an_axis_is_the_identity(size, tmp_path):
    """Asked for by its number, after scores have put the positions into another order."""
    weights = {key: tensor.bfloat16() for key, tensor in random_weights(MIXTURE).items()}
    with writing(tmp_path / "mixture", MIXTURE) as writer:
        for key, tensor in weights.items():
            writer.write(key, tensor)
    others = {"num_layers": len(MIXTURE.layers.blocks), "attention_layers": 1}
    number: Any = others[size] if size in others else getattr(MIXTURE, size)
    plan = make_plan(random_scores(MIXTURE), MIXTURE, Targets(**{size: number}))
    reader = CheckpointReader(apply(plan, tmp_path / "mixture", tmp_path / "out"))
    assert list(reader.shapes) == list(weights)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in weights.items())


def test_cut_weights_are_the_ones_that_indexing_gives(source, weights, tmp_path):
    reader = CheckpointReader(apply(PLAN, source, tmp_path / "out"))
    assert reader.shapes == axes.tensors(PLAN.target)
    w = {key.removeprefix("decoder.layers."): tensor for key, tensor in weights.items()}
    gate_and_up = [1, 4, 9, 11, 14, 19]
    qkv = [head * 4 + channel for head in (2, 3, 4, 5, 8, 9) for channel in range(4)]  # q0 q1 [q2 k v | q3] q4 q5 [k v]
    inner = [8, 13, 15, 16, 21, 23]
    mamba = "4.mixer."
    expected = {
        "embedding.word_embeddings.weight": w["embedding.word_embeddings.weight"][:, HIDDEN],
        "decoder.final_norm.weight": w["decoder.final_norm.weight"][HIDDEN],
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": w[
            "2.self_attention.linear_qkv.layer_norm_weight"
        ][HIDDEN],
        "decoder.layers.0.self_attention.linear_qkv.weight": w["2.self_attention.linear_qkv.weight"][qkv][:, HIDDEN],
        "decoder.layers.0.self_attention.linear_proj.weight": w["2.self_attention.linear_proj.weight"][HIDDEN][:, 8:16],
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": w["3.mlp.linear_fc1.layer_norm_weight"][HIDDEN],
        "decoder.layers.1.mlp.linear_fc1.weight": w["3.mlp.linear_fc1.weight"][gate_and_up][:, HIDDEN],
        "decoder.layers.1.mlp.linear_fc2.weight": w["3.mlp.linear_fc2.weight"][HIDDEN][:, [1, 4, 9]],
    }
    for name, rows in {
        "in_proj.layer_norm_weight": HIDDEN,
        "conv1d.weight.x": inner,
        "conv1d.bias.x": inner,
        "norm.weight": inner,
        "dt_bias": [1, 2],
        "A_log": [1, 2],
        "D": [1, 2],
    }.items():
        expected[f"decoder.layers.2.mixer.{name}"] = w[mamba + name][rows]
    for name in ("conv1d.weight.B", "conv1d.weight.C", "conv1d.bias.B", "conv1d.bias.C"):
        expected[f"decoder.layers.2.mixer.{name}"] = w[mamba + name]
    for part, rows in {"z": inner, "x": inner, "B": range(32), "C": range(32), "dt": [1, 2]}.items():
        expected[f"decoder.layers.2.mixer.in_proj.weight.{part}"] = w[f"{mamba}in_proj.weight.{part}"][rows][:, HIDDEN]
    expected["decoder.layers.2.mixer.out_proj.weight"] = w[mamba + "out_proj.weight"][HIDDEN][:, inner]
    assert expected.keys() == reader.shapes.keys()
    for key, tensor in expected.items():
        assert torch.equal(reader.read(key), tensor), key


def test_the_result_knows_its_model_and_its_plan(source, tmp_path):
    out = apply(PLAN, source, tmp_path / "out")
    assert layout.architecture(out / "release") == PLAN.target
    assert layout.common(out / "release")["args"].lr == 0.1
    assert Plan.load(out / "plan.json") == PLAN


def test_two_cuts_equal_one(source, tmp_path):
    first = Plan(
        source=ARCH, target=replace(ARCH, hidden_size=12), units=(0, 1, 2, 3, 4), hidden=tuple(range(0, 24, 2))
    )
    second = Plan(source=first.target, target=replace(ARCH, hidden_size=3), units=first.units, hidden=(1, 4, 7))
    both = Plan(source=ARCH, target=second.target, units=first.units, hidden=(2, 8, 14))
    apply(second, apply(first, source, tmp_path / "first"), tmp_path / "second")
    apply(both, source, tmp_path / "both")
    a, b = CheckpointReader(tmp_path / "second"), CheckpointReader(tmp_path / "both")
    assert all(torch.equal(a.read(key), b.read(key)) for key in axes.keys(both.target))


def test_an_interrupted_cut_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(reader, key, place, rows=None, fill=CheckpointReader.fill):
        if "final_norm" in key:
            raise KeyboardInterrupt
        fill(reader, key, place, rows)

    monkeypatch.setattr(CheckpointReader, "fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(PLAN, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten_and_foreign_plans_are_refused(source, tmp_path):
    before = layout.fingerprint(source / "release")
    with pytest.raises(CheckpointError, match="exists already"):
        apply(PLAN, source, source)
    with pytest.raises(PlanError, match="another model"):
        apply(Plan.keep_everything(replace(ARCH, hidden_size=32)), source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        apply(PLAN, tmp_path / "nowhere", tmp_path / "out")
    assert layout.fingerprint(source / "release") == before
    assert not (tmp_path / "out").exists()


def test_a_plan_of_other_weights_is_refused_and_one_that_says_nothing_fits_any(source, tmp_path):
    own = replace(PLAN.provenance, fingerprint=layout.fingerprint(source / "release"))
    plan = replace(PLAN, provenance=replace(own, fingerprint="0" * 16, iteration=4))
    with pytest.raises(PlanError, match="other weights of this model") as error:
        apply(plan, source, tmp_path / "out")
    assert "made from iteration 4" in str(error.value)
    assert not (tmp_path / "out").exists()
    for name, fingerprint in (("own", own.fingerprint), ("any", "")):
        apply(replace(PLAN, provenance=replace(own, fingerprint=fingerprint)), source, tmp_path / name)
