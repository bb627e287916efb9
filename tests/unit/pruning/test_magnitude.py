"""Magnitude scores against sums over the rows and columns that Megatron's layouts give a position, written out here."""

from dataclasses import replace

import pytest
import torch
from random_models import random_weights
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning import magnitude
from megatron_ext.pruning.magnitude import magnitudes

HIDDEN, FFN, HEADS, GROUPS, CHANNELS = 14, 10, 4, 2, 3
MAMBA_HEADS, HEAD_DIM, STATE, MAMBA_GROUPS = 4, 6, 5, 2
ARCH = replace(
    PRESETS["tiny-hybrid"].architecture,
    pattern="-*M",
    hidden_size=HIDDEN,
    padded_vocab_size=16,
    ffn_hidden_size=FFN,
    num_attention_heads=HEADS,
    num_query_groups=GROUPS,
    kv_channels=CHANNELS,
    mamba_num_heads=MAMBA_HEADS,
    mamba_head_dim=HEAD_DIM,
    mamba_state_dim=STATE,
    mamba_num_groups=MAMBA_GROUPS,
)


@pytest.fixture(scope="module")
def squares():
    return {key: tensor.square() for key, tensor in random_weights(ARCH).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("magnitude") / "model"
    with writing(path, ARCH) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor)
    return path


@pytest.fixture(scope="module")
def scores(model):
    return magnitudes(CheckpointReader(model), ARCH)


def check(score, squares):
    torch.testing.assert_close(score.double().square(), squares, rtol=1e-6, atol=0)


def test_neurons_count_their_gate_their_input_and_their_output(scores, squares):
    first, second = (squares[f"decoder.layers.0.mlp.linear_fc{n}.weight"] for n in (1, 2))
    check(scores["layers.0.ffn"], first[:FFN].sum(1) + first[FFN:].sum(1) + second.sum(0))


def test_query_heads_count_their_queries_and_their_output(scores, squares):
    qkv, out = (squares[f"decoder.layers.1.self_attention.linear_{n}.weight"] for n in ("qkv", "proj"))
    each = HEADS // GROUPS
    expected = []
    for head in range(HEADS):
        row = (head // each * (each + 2) + head % each) * CHANNELS  # a group's queries, then its key and its value
        expected.append(qkv[row : row + CHANNELS].sum() + out[:, head * CHANNELS : (head + 1) * CHANNELS].sum())
    check(scores["layers.1.query_head"], torch.stack(expected))


def test_mamba_channels_and_states_count_their_rows(scores, squares):
    mixer = {key.split(".mixer.")[1]: value for key, value in squares.items() if ".mixer." in key}

    def rows(part):
        named = [mixer[f"{name}.{part}"] for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias")]
        return sum(tensor.reshape(len(tensor), -1).sum(1) for tensor in named)

    channels = rows("x") + mixer["in_proj.weight.z"].sum(1) + mixer["norm.weight"] + mixer["out_proj.weight"].sum(0)
    check(scores["layers.2.mamba"], channels.view(MAMBA_HEADS, HEAD_DIM))
    check(scores["layers.2.state"], (rows("B") + rows("C")).view(MAMBA_GROUPS, STATE))


def test_hidden_channels_count_all_that_reads_and_writes_them(scores, squares):
    expected = torch.zeros(HIDDEN, dtype=torch.float64)  # no other size is 14
    for tensor in squares.values():
        if HIDDEN in tensor.shape:
            expected += tensor.movedim(tensor.shape.index(HIDDEN), 0).reshape(HIDDEN, -1).sum(1)
    check(scores["hidden"], expected)


def test_every_score_is_there(scores):
    names = {"hidden", "layers.0.ffn", "layers.1.query_head", "layers.2.mamba", "layers.2.state"}
    assert scores.keys() == names


class Largest(TorchDispatchMode):
    """The most elements of a float64 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_holds_some_rows_of_a_weight_in_float64(tmp_path, monkeypatch):
    """Of experts, too, whatever their size; the sums are the same."""
    arch = replace(
        ARCH, pattern="-E", num_experts=3, moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=4,
        moe_router_topk=2, padded_vocab_size=64,
    )  # fmt: skip
    weights = {key: tensor.bfloat16() for key, tensor in random_weights(arch).items()}
    with writing(tmp_path / "model", arch) as writer:
        for key, tensor in weights.items():
            writer.write(key, tensor)
    expected = magnitudes(CheckpointReader(tmp_path / "model"), arch)
    monkeypatch.setattr(magnitude, "ELEMENTS", 5 * HIDDEN)
    with Largest() as largest:
        found = magnitudes(CheckpointReader(tmp_path / "model"), arch)
    assert largest.elements <= 5 * HIDDEN
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    down = weights["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"].double().square().sum(1)
    up = (
        weights["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].double().square().sum(2).view(3, -1, 8).sum(1)
    )
    check(expected["layers.1.expert_ffn"], up + down)
