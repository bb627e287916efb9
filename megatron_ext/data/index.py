"""The index of one of Megatron's datasets: how long each sequence is, and how large `.bin` must be.

Read without Megatron, in milliseconds whatever the size, so that a job can look before it starts anything.

Source: megatron/core/datasets/indexed_dataset.py, `_IndexReader`: 9 bytes of header, version (uint64), type (uint8),
number of sequences and of document borders (uint64 each), lengths (int32), offsets in bytes (int64), borders (int64).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("borders", "<u8")])
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # of Megatron's type codes
CHUNK = 1 << 20  # sequences whose lengths are added at once, or looked at


@dataclass(frozen=True)
class Index:
    """One dataset on disk.

    Attributes:
        prefix: Its path without `.bin` and `.idx`.
        lengths: Tokens of each sequence (a document, in the datasets made here), (n,) int32, on disk.
        offsets: Where each begins in `.bin`, in bytes, (n,) int64, on disk.
        item_bytes: Of a token.
        bin_bytes: Size of `.bin` according to the index.
    """

    prefix: str
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    item_bytes: int
    bin_bytes: int

    @classmethod
    def read(cls, prefix: str) -> "Index":
        """The index of `prefix`.idx.

        Raises:
            DataError: It is missing, no index, or shorter than it says.
        """
        path = Path(f"{prefix}.idx")
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                start = stream.read(HEADER.itemsize)
        except OSError as error:
            raise DataError(f"the index cannot be read: {error.strerror}", got=path) from error
        header = np.frombuffer(start, HEADER)[0] if len(start) == HEADER.itemsize else None
        if header is None or not start.startswith(MAGIC) or header["version"] != 1 or header["type"] not in ITEM_BYTES:
            raise DataError("no index of Megatron's", got=path, legal="a dataset made by `megatron-ext data`")
        count, borders = int(header["sequences"]), int(header["borders"])
        needed = HEADER.itemsize + 12 * count + 8 * borders
        if size < needed:
            raise DataError("the index is cut off", got=f"{path}: {size:,} bytes", legal=f"{needed:,} bytes")
        item_bytes = ITEM_BYTES[int(header["type"])]
        if not count:
            return cls(prefix, np.empty(0, np.int32), np.empty(0, np.int64), item_bytes, 0)
        lengths = np.memmap(path, "<i4", "r", HEADER.itemsize, (count,))
        offsets = np.memmap(path, "<i8", "r", HEADER.itemsize + 4 * count, (count,))
        return cls(prefix, lengths, offsets, item_bytes, int(offsets[-1]) + int(lengths[-1]) * item_bytes)

    def check_bin(self) -> None:
        """Check that `.bin` has the size that the index says, and that each sequence begins where the last one ends.

        Of a larger index the first `CHUNK` sequences, so that it takes milliseconds.

        Raises:
            DataError: It has another size: it is cut off, or belongs to another index. Or the index is damaged.
        """
        path = Path(f"{self.prefix}.bin")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"the data cannot be read: {error.strerror}", got=path) from error
        if size != self.bin_bytes:
            raise DataError(
                "the data and its index do not belong together", got=f"{path}: {size:,} bytes",
                legal=f"{self.bin_bytes:,} bytes, as {Path(self.prefix).name}.idx says",
            )  # fmt: skip
        sizes = self.lengths[:CHUNK].astype(np.int64) * self.item_bytes
        begins = np.cumsum(sizes) - sizes
        wrong = np.flatnonzero((self.offsets[:CHUNK] != begins) | (sizes < 0))
        if len(wrong):
            raise DataError(
                "the index is damaged", legal="sequences that follow one another: make the data anew",
                got=f"{self.prefix}.idx: sequence {wrong[0]} begins at byte {self.offsets[wrong[0]]}, "
                f"the one before it ends at {begins[wrong[0]]}",
            )  # fmt: skip

    def tokens(self, first: int, stop: int, enough: int) -> int:
        """Tokens of the sequences from `first` to `stop`; counted until there are `enough`."""
        total = 0
        for start in range(first, stop, CHUNK):
            total += int(self.lengths[start : min(stop, start + CHUNK)].sum(dtype=np.int64))
            if total >= enough:
                break
        return total
