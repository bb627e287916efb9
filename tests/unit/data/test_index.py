"""What the index says of a dataset is what Megatron's builder wrote, and what it must have for `.bin`."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.index import Index
from megatron_ext.errors import DataError
from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported


def write(prefix: Path, lengths: list[int], kind: type = np.int32) -> str:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
    for length in lengths:
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
def test_lengths_and_size(tmp_path: Path, kind: type) -> None:
    index = Index.read(write(tmp_path / "text", [5, 7, 1, 100], kind))
    assert index.lengths.tolist() == [5, 7, 1, 100]
    assert index.bin_bytes == 113 * np.dtype(kind).itemsize == (tmp_path / "text.bin").stat().st_size
    index.check_bin()
    assert [index.tokens(0, 4, 1000), index.tokens(1, 3, 1000), index.tokens(2, 2, 1)] == [113, 8, 0]


def test_an_empty_dataset(tmp_path: Path) -> None:
    index = Index.read(write(tmp_path / "text", []))
    assert (len(index.lengths), index.bin_bytes) == (0, 0)
    index.check_bin()


@pytest.mark.parametrize("change", [-8, -4, 4])
def test_a_bin_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    index = Index.read(write(tmp_path / "text", [5, 7]))
    content = (tmp_path / "text.bin").read_bytes()
    (tmp_path / "text.bin").write_bytes((content + bytes(4))[: 48 + change])
    with pytest.raises(DataError, match=rf"(?s)do not belong together.*: {48 + change} bytes.*48 bytes"):
        index.check_bin()


@pytest.mark.parametrize("place", [34, 35, 37, 38, 46, 50, 54])
def test_an_index_with_a_wrong_byte_is_refused(tmp_path: Path, place: int) -> None:
    """A length (4 bytes each, three from 34 on) or an offset (8 bytes each, from 46 on) that is another."""
    prefix = write(tmp_path / "text", [5, 7, 3])
    content = bytearray((tmp_path / "text.idx").read_bytes())
    content[place] ^= 0x80
    (tmp_path / "text.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"the index is damaged\n.*text\.idx: sequence"):
        Index.read(prefix).check_bin()


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", [5, 7])
    content = (tmp_path / "text.idx").read_bytes()
    for broken, said in ((b"", "no index"), (b"x" * 100, "no index"), (content[:-1], "cut off")):
        (tmp_path / "text.idx").write_bytes(broken)
        with pytest.raises(DataError, match=said):
            Index.read(prefix)
    (tmp_path / "text.idx").unlink()
    with pytest.raises(DataError, match=r"cannot be read.*\n.*text\.idx"):
        Index.read(prefix)
