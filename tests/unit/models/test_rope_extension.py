from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.models.presets import PRESETS
from megatron_ext.models.rope_extension import extension, ntk_base

ROTARY = PRESETS["llama3.1-8b"].architecture
ROTARY = replace(ROTARY, max_position_embeddings=4096, rotary_base=10000, rope_scaling_factor=None)
HYBRID = PRESETS["mamba2-hybrid-8b"].architecture


def given(length: int | None, **flags: object) -> Namespace:
    absent = {"max_position_embeddings": None, "rotary_base": None, "use_rope_scaling": False}
    return Namespace(seq_length=length, **absent | flags)


@pytest.mark.parametrize("length", [8192, 16384, 131072])
def test_the_slowest_channel_turns_as_far_as_before(length: int) -> None:
    base, dims = ntk_base(ROTARY, length), ROTARY.kv_channels
    slowest = (dims - 2) / dims
    before, after = 4096 * ROTARY.rotary_base**-slowest, length * base**-slowest
    assert after == pytest.approx(before, rel=1e-4)


def test_rotary_positions_need_a_word() -> None:
    with pytest.raises(ConfigError, match=f"--rotary-base {ntk_base(ROTARY, 16384)}"):
        extension(ROTARY, given(16384))
    longer = ["--max-position-embeddings", "16384"]
    assert extension(ROTARY, given(16384, rotary_base=500_000)) == longer
    assert extension(ROTARY, given(16384, use_rope_scaling=True)) == longer


def test_without_positions_nothing_is_needed() -> None:
    assert extension(HYBRID, given(131_072)) == ["--max-position-embeddings", "131072"]


@pytest.mark.parametrize("flags", [given(4096), given(None), given(16384, max_position_embeddings=16384)])
def test_what_fits_or_is_said_is_left_alone(flags: Namespace) -> None:
    assert extension(ROTARY, flags) == []
