"""The model in plain formulas: its parts against torch's own where torch has them, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from random_models import random_weights

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.reference import WHOLE, attention, forward, mask, rms_norm

ARCH = Architecture(
    pattern="*-", padded_vocab_size=24, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2,
    kv_channels=6, mamba_num_heads=2, gated_linear_unit=True, activation="silu", max_position_embeddings=16,
)  # fmt: skip


def test_attention_is_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=generator)
    qkv = torch.randn(2 * 4 * 6, 16, dtype=torch.float64, generator=generator)
    w = {"self_attention.linear_qkv.weight": qkv, "self_attention.linear_proj.weight": torch.eye(24).double()}
    update, inner = attention(ARCH, w, x, WHOLE)
    parts = (x @ qkv.T).view(2, 7, 2, 4, 6)
    query, key, value = parts[:, :, :, :2].flatten(2, 3), parts[:, :, :, 2], parts[:, :, :, 3]
    expected = F.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (query, key, value)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(update, expected.flatten(2))


def test_the_norm_is_torchs_of_what_counts() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, mask(None, 5)), F.rms_norm(x, (5,), weight, 1e-5))
    got = rms_norm(x, weight, 1e-5, mask((0, 3), 5))
    torch.testing.assert_close(got[:, [0, 3]], F.rms_norm(x[:, [0, 3]], (2,), weight[[0, 3]], 1e-5))
    assert not got[:, [1, 2, 4]].any()


def test_what_is_left_out_is_not_there() -> None:
    weights, tokens = random_weights(ARCH), torch.arange(8).view(1, 8)
    whole, seen = forward(ARCH, weights, tokens)
    assert [set(layer) for layer in seen] == [{"input", "norm", "inner", "output"}] * 2
    first, _ = forward(ARCH, weights, tokens, skip=[1])
    same, _ = forward(ARCH, weights, tokens, kept={0: WHOLE})
    assert first.equal(same)
    assert not first.equal(whole)


def test_a_linear_sublayer_is_a_map_of_the_stream() -> None:
    """Without a norm; of rank 0 it is a bias, and masked channels neither go in nor come out."""
    for rank in (0, 3):
        arch = replace(ARCH, pattern="*L-", linear_rank=rank)
        weights, tokens = random_weights(arch), torch.arange(8).view(1, 8)
        _, seen = forward(arch, weights, tokens)
        own = {
            key.removeprefix("decoder.layers.1."): w
            for key, w in weights.items()
            if key.startswith("decoder.layers.1.")
        }
        matrix = own["up"] @ own["down"] if rank else torch.zeros(16, 16).double()
        assert own.keys() == ({"down", "up", "bias"} if rank else {"bias"})
        torch.testing.assert_close(seen[1]["output"], seen[1]["input"] @ (torch.eye(16) + matrix).T + own["bias"])
        few = KeptIndices(hidden=(0, 3, 4))
        _, masked = forward(arch, weights, tokens, kept=dict.fromkeys(range(3), few))
        assert not masked[1]["output"][..., [1, 2, *range(5, 16)]].any()


def test_a_model_with_more_is_refused() -> None:
    arch = replace(ARCH, add_bias_linear=True)
    with pytest.raises(ConfigError, match="'add_bias_linear': True"):
        forward(arch, random_weights(arch), torch.zeros(1, 4, dtype=torch.long))
