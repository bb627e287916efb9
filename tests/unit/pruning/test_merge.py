"""Minitron's head merge, head by head: each kept one is twice itself minus the dropped one."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.merge import merge_heads

ARCH = replace(
    PRESETS["tiny-hybrid"].architecture, num_attention_heads=6, num_query_groups=2, kv_channels=4, hidden_size=5
)
ROWS = [(group, part) for group in range(2) for part in ("q0", "q1", "q2", "k", "v")]  # as a projection holds them


@pytest.mark.parametrize("shape", [(40, 5), (40,)], ids=["weight", "bias"])
def test_only_the_heads_that_take_one_in_change(shape: tuple[int, ...]) -> None:
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    merged = merge_heads(ARCH, projection, [(0, 2), (4, 3)])
    before = dict(zip(ROWS, projection.split(4), strict=True))
    for row, after in zip(ROWS, merged.split(4), strict=True):
        expected = before[row]
        if row == (0, "q0"):
            expected = 2 * before[row] - before[0, "q2"]
        if row == (1, "q1"):
            expected = 2 * before[row] - before[1, "q0"]
        torch.testing.assert_close(after, expected)
