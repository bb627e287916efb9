"""Keys are rotated once, when they are kept, each by its own position."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.models.bootstrap import prepare


@pytest.fixture
def attention() -> Any:
    """An attention layer as far as its cache goes: two groups of eight channels, a third of them rotated."""
    prepare()
    import megatron.core.transformer.attention as module

    config = SimpleNamespace(
        flash_decode=False, apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )

    def memory(length: int, batch: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(length, batch, 2, size, dtype=dtype)

    layer = SimpleNamespace(
        config=config, attn_mask_type=None, layer_number=1, key_hidden_size=8, val_hidden_size=8, training=False,
        pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)), _yarn_concentration_factor=1.0,
        _allocate_memory=memory,
    )  # fmt: skip
    return lambda *given: module.Attention._adjust_key_value_for_inference(layer, *given)


def rotated(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The rotary embedding by complex numbers: channel i of the first half is turned with channel i of the second."""
    half = angles.shape[-1] // 2
    turned = torch.complex(keys[..., :half], keys[..., half : 2 * half])
    turned = turned * torch.polar(torch.ones_like(angles[..., :half]), angles[..., :half])
    return torch.cat([turned.real, turned.imag, keys[..., 2 * half :]], -1)


def test_each_key_is_rotated_once_by_its_own_position(attention: Any) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(3, 12)
    positions = torch.arange(12).float()[:, None, None, None]
    angles = (positions * torch.tensor([1.0, 0.1])).repeat(1, 1, 1, 2)  # (12, 1, 1, 4)
    keys, values, queries = torch.randn(12, 3, 2, 8), torch.randn(12, 3, 2, 8), torch.randn(12, 3, 4, 8)
    expected, expected_queries = rotated(keys, angles), rotated(queries, angles)
    start = 0
    for stop in (5, 6, 7, 12):
        own = slice(start, stop)
        query, key, value, rotary, *_ = attention(context, queries[own], keys[own], values[own], (angles, angles))
        assert rotary is None  # nothing is rotated again
        torch.testing.assert_close(query, expected_queries[own])
        torch.testing.assert_close(key, expected[:stop])
        assert torch.equal(value, values[:stop])
        context.increment_sequence_len_offset(stop - start)
        start = stop
