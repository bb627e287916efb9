"""Sequences are split over context-parallel ranks as Megatron splits its batches, and put together again."""

from itertools import pairwise

import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ext.platform.context_parallel import zigzag_join, zigzag_of_documents, zigzag_split

RANKS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_it_is_megatrons_split(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    tokens = torch.arange(24).view(2, 12)
    expected = get_batch_on_this_cp_rank({"tokens": tokens.clone()}, is_hybrid_cp=False)["tokens"]
    assert zigzag_split(tokens.T, rank, ranks).T.equal(expected)
    assert zigzag_split(tokens, rank, ranks, dim=1).equal(expected)


def test_a_part_is_a_piece_and_its_mirror_image() -> None:
    states = torch.arange(8.0).view(8, 1, 1)
    assert zigzag_split(states, 0, 2).flatten().tolist() == [0, 1, 6, 7]
    assert zigzag_split(states, 1, 2).flatten().tolist() == [2, 3, 4, 5]
    assert zigzag_split(states, 0, 1) is states


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_parts_make_the_whole(ranks: int) -> None:
    states = torch.arange(36).view(12, 3)
    parts = torch.cat([zigzag_split(states, rank, ranks) for rank in range(ranks)])
    assert zigzag_join(parts, ranks).equal(states)


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_each_document_is_split_for_itself(rank: int, ranks: int) -> None:
    """By the split of each document alone; the second row has one document fewer."""
    rows = [[0, 12, 36, 48], [0, 24, 48, 48]]
    expected = [
        torch.cat([zigzag_split(torch.arange(*document), rank, ranks) for document in pairwise(row)])
        for row in ([0, 12, 36, 48], [0, 24, 48])
    ]
    found = zigzag_of_documents(torch.tensor(rows, dtype=torch.int32), 48, rank, ranks)
    assert found.equal(torch.stack(expected))
