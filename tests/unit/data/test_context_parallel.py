"""Sequences are split over context-parallel ranks as Megatron splits its batches."""

import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ext.data.context_parallel import zigzag_split


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
def test_it_is_megatrons_split(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    tokens = torch.arange(24).view(2, 12)
    expected = get_batch_on_this_cp_rank({"tokens": tokens.clone()}, is_hybrid_cp=False)["tokens"]
    assert zigzag_split(tokens.T, rank, ranks).T.equal(expected)


def test_a_part_is_a_piece_and_its_mirror_image() -> None:
    states = torch.arange(8.0).view(8, 1, 1)
    assert zigzag_split(states, 0, 2).flatten().tolist() == [0, 1, 6, 7]
    assert zigzag_split(states, 1, 2).flatten().tolist() == [2, 3, 4, 5]
    assert zigzag_split(states, 0, 1) is states
