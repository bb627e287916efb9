"""The chunks and tiles in which the Triton kernels do a scan. Triton itself is not needed here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.triton_tiles import cdiv, tile_side

# Tokens in a chunk, and after which a state is kept for the backward; half as many where they would not fit.
CHUNK = 128
# Programs that keep every multiprocessor of a large GPU busy, with some to spare.
MANY_PROGRAMS = 512
# Programs that walk the sequence which such a GPU holds at a time: two on each multiprocessor.
WALKERS = 256
# Passes over the states are two where there are this many runs of this many chunks, or more: x and B are read twice,
# and each pass takes the time of a run.
LEAST_RUNS, LEAST_RUN = 4, 4


@dataclass(frozen=True)
class ScanTiling:
    """The sizes of a scan and of the tiles it is done in."""

    batch: int
    length: int
    heads: int
    channels: int
    groups: int
    state: int
    chunk: int
    rows: int

    @property
    def chunks(self) -> int:
        return cdiv(self.length, self.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.chunk

    @property
    def group(self) -> int:
        """Heads in a group."""
        return self.heads // self.groups

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        return {"HEADS": self.heads, "GROUP": self.group, "P": self.channels, "N": self.state, "CHUNK": self.chunk}

    def channel_block(self) -> int:
        """Channels of a program that walks the sequence: a head's, as all of them go with the same B and C.

        Half of them where whole heads are too few programs, and the sequence is too short to walk in runs.
        """
        whole, enough = tile_side(self.channels), WALKERS // 2
        few = self.batch * self.heads < enough and self.chunks < LEAST_RUNS * LEAST_RUN
        return whole // 2 if few and whole >= 64 else whole

    def run(self) -> int:
        """Chunks that a program which walks the sequence takes: all, or fewer where that makes too few programs."""
        programs = self.batch * self.heads * cdiv(self.channels, self.channel_block())
        runs = min(WALKERS // programs, self.chunks // LEAST_RUN)
        return self.chunks if runs < LEAST_RUNS else cdiv(self.chunks, runs)

    def heads_per_program(self) -> int:
        """Heads of a program of the forward scan: all of a group, or fewer where that makes too few programs."""
        programs = self.batch * self.groups * self.padded // self.rows
        wanted = max(1, min(self.group, self.group * programs // MANY_PROGRAMS))
        return next(count for count in range(wanted, 0, -1) if self.group % count == 0)


def scan_tiling(x: Tensor, B: Tensor, chunk_size: int | None) -> ScanTiling:
    """Sizes and tiles of a scan.

    At most `CHUNK` tokens: each chunk's state is written and read, and 64 tokens would double that, while 256 would
    not fit the registers of the backward, nor shared memory. Float32 and large states get half. Blocks of a chunk have
    64, the side of the tile that matrix units multiply, but of float32 more than 32 do not fit.

    Raises:
        ConfigError: The heads do not divide into the groups, the sequence is empty, or the chunk is no tile.
    """
    batch, length, heads, channels = x.shape
    groups, state = B.shape[2:]
    if heads % groups:
        raise ConfigError("the heads of a state-space layer do not divide into its groups", got=f"{heads} / {groups}")
    if length == 0:
        raise ConfigError("a state-space scan needs at least one token", got=tuple(x.shape))
    small = x.dtype == torch.float32 or state > 128 or channels > 64
    most = CHUNK // 2 if small else CHUNK
    if chunk_size and chunk_size != tile_side(chunk_size):
        raise ConfigError("a chunk of the Triton scan is a power of two", got=chunk_size, legal="16, 32, 64, 128, ...")
    chunk = min(chunk_size or tile_side(length), most)
    rows = min(chunk, 32 if x.dtype == torch.float32 else 64)
    return ScanTiling(batch, length, heads, channels, groups, state, chunk, rows)
