"""A table of moves: what goes from file to file, what through memory, and which process carries out which."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.checkpoint import ranks, stream
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.huggingface.shards import Shards, writing_shards
from megatron_ext.checkpoint.stream import Assembly, Move, Part
from megatron_ext.errors import CheckpointError

TENSORS = {"a": torch.randn(300, 80), "b": torch.randn(200, 80), "bias": torch.randn(80)}


@pytest.fixture
def source(tmp_path: Path) -> Shards:
    (tmp_path / "source").mkdir()
    entries = {name: TensorEntry(tuple(value.shape), value.dtype) for name, value in TENSORS.items()}
    with writing_shards(tmp_path / "source", entries) as writer:
        for name, value in TENSORS.items():
            writer.write(name, value)
    return Shards(tmp_path / "source")


def move(target: str, shape: tuple[int, ...], *parts: Part, dtype: torch.dtype = torch.float32, **more: object) -> Move:
    return Move(target, TensorEntry(shape, dtype), parts, **more)  # type: ignore[arg-type]


BOTH = (Part("a", place=lambda t: t[:300]), Part("b", place=lambda t: t[300:]))
# What is asked, what it must be, and whether it goes from file to file.
ROWS: list[tuple[Move, Tensor, bool]] = [
    (move("whole", (300, 80), Part("a")), TENSORS["a"], True),
    (move("reshaped", (80, 300), Part("a")), TENSORS["a"].view(80, 300), True),
    (move("concatenated", (500, 80), *BOTH), torch.cat([TENSORS["a"], TENSORS["b"]]), True),
    (move("small", (80,), Part("bias")), TENSORS["bias"], False),
    (move("cast", (300, 80), Part("a"), dtype=torch.bfloat16), TENSORS["a"].bfloat16(), False),
    (move("rows", (250, 80), Part("a", (20, 270))), TENSORS["a"][20:270], False),
    (move("seen", (300, 40), Part("a", view=lambda t: t[:, ::2])), TENSORS["a"][:, ::2], False),
    (move("padded", (302, 80), Part("a", place=lambda t: t[:300]), padding=2),
     torch.cat([TENSORS["a"], torch.zeros(2, 80)]), False),
    (move("interleaved", (300, 2, 80), Part("a", place=lambda t: t[:, 0]), Part("a", place=lambda t: t[:, 1])),
     torch.stack([TENSORS["a"], TENSORS["a"]], 1), False),
    (move("gathered", (2, 3), Part("a"), gather=(torch.tensor([3, 7]), torch.tensor([0, 1, 9]))),
     TENSORS["a"][[3, 7]][:, [0, 1, 9]], False),
    (move("computed", (300, 80), Part("a"), function=lambda t: t * 2), TENSORS["a"] * 2, False),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected", "raw"), ROWS, ids=[row.target for row, _, _ in ROWS])
def test_a_move_makes_what_it_says(
    source: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Move, expected: Tensor, raw: bool
) -> None:
    made: list[str] = []

    def make(self: Assembly, move: Move, make=Assembly.make) -> Tensor:
        made.append(move.target)
        return make(self, move)

    monkeypatch.setattr(Assembly, "make", make)
    seen: list[tuple[int, int]] = []
    with writing_shards(tmp_path, {row.target: row.entry}) as writer:
        stream.run([row], source, writer, lambda done, total: seen.append((done, total)))
    assert made == ([] if raw else [row.target])
    assert seen == [(row.entry.nbytes, row.entry.nbytes)]
    place = torch.empty(row.entry.shape, dtype=row.entry.dtype)
    Shards(tmp_path).fill(row.target, place)
    assert torch.equal(place, expected)


def test_what_is_never_decoded_is_compared_too(source: Shards, tmp_path: Path) -> None:
    path = source.entries["a"].path
    content = bytearray(path.read_bytes())
    content[source.entries["a"].offset + 5000] ^= 4
    path.write_bytes(content)
    row = ROWS[0][0]
    with (
        pytest.raises(CheckpointError, match="is not what was written"),
        writing_shards(tmp_path, {"whole": row.entry}) as out,
    ):
        stream.run([row], source, out)


def test_rows_in_any_order_are_compared(source: Shards) -> None:
    place = torch.empty(100, 80)
    for first in (100, 0, 100, 200):
        source.fill("a", place, (first, first + 100))
        assert torch.equal(place, TENSORS["a"][first : first + 100])


def test_moves_that_share_a_source_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        move(name, (rows, 4), Part(name[0])) for name, rows in (("a1", 2), ("a2", 2), ("b", 3), ("c1", 1), ("c2", 1))
    ]
    monkeypatch.setattr(ranks, "count", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append([row.target for row in stream.own_share(table)])
    assert shares == [["a1", "a2"], ["b", "c1", "c2"]]
