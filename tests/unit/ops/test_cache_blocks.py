"""Pieces cover what there is, once and in order."""

import pytest
import torch

from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS, blocks, rows_per_block


@pytest.mark.parametrize(("count", "elements"), [(0, 1), (1, 1 << 30), (7, 1 << 17), (1000, 999)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pieces_cover_everything_and_fit(count: int, elements: int, device: str) -> None:
    found = list(blocks(count, elements, torch.device(device)))
    assert [i for piece in found for i in range(count)[piece]] == list(range(count))
    for piece in found:
        own = piece.stop - piece.start
        assert own == 1 or own * elements <= BLOCK_ELEMENTS[device]


def test_a_cpu_takes_a_row_at_a_time() -> None:
    assert [rows_per_block(5, torch.device(name)) for name in ("cpu", "cuda")] == [1, 5]
