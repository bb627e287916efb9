"""Weights that others stored in 8 bits with a scale for each block, read as the numbers that they stand for.

Qwen3-FP8 and DeepSeek-V3 do so: `X.weight` in float8, and `X.weight_scale_inv`, which each of its blocks is multiplied
by. Every other quantization is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.checkpoint.huggingface.shards import ShardEntry, Shards
from megatron_ext.errors import CheckpointError

ENTRY = "quantization_config"
SCALES = "_scale_inv"
_ROWS_AT_A_TIME = 2**24  # numbers, of whole rows of blocks


def block_size(config: Config) -> tuple[int, int] | None:
    """Rows and columns of a block; None for weights that are not quantized.

    Raises:
        CheckpointError: They are quantized in another way.
    """
    given = config.get(ENTRY)
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    blocks = given.get("weight_block_size") if isinstance(given, Mapping) else None
    if method != "fp8" or not (isinstance(blocks, list) and len(blocks) == 2 and all(type(b) is int for b in blocks)):
        raise CheckpointError(
            "config.json: weights that are quantized in this way are not read", got=f"{method}, blocks of {blocks}",
            legal="fp8 in blocks (weight_block_size), or the model as it was before it was quantized",
        )  # fmt: skip
    return blocks[0], blocks[1]


def without(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of the numbers that weights stand for."""
    return {name: value for name, value in config.items() if name != ENTRY}


class BlockScaled:
    """As `Shards`, of weights in float8 with scales, which it gives as bfloat16.

    Args:
        shards: The tensors as they are stored.
        blocks: Rows and columns of a block.

    Raises:
        CheckpointError: A weight has no scales, or others than one for each block.
    """

    def __init__(self, shards: Shards, blocks: tuple[int, int]) -> None:
        self._shards, self._blocks = shards, blocks
        self.entries: dict[str, ShardEntry] = {}
        self._scaled: set[str] = set()
        for key, entry in shards.entries.items():
            if key.endswith(SCALES):
                continue
            if entry.dtype != torch.float8_e4m3fn:
                self.entries[key] = entry
                continue
            scales = shards.entries.get(key + SCALES)
            wanted = tuple(-(-size // block) for size, block in zip(entry.shape, blocks, strict=False))
            if scales is None or scales.shape != wanted:
                got = "none" if scales is None else scales.shape
                raise CheckpointError(f"{key!r} has not one scale for each block", got=got, legal=wanted)
            self.entries[key] = replace(entry, dtype=torch.bfloat16)
            self._scaled.add(key)

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read a tensor, or whole rows of it; see `Shards.fill`."""
        if key not in self._scaled:
            self._shards.fill(key, place, rows)
            return
        entry, scales = self._shards.entries[key], self._shards.entries[key + SCALES]
        height, width = self._blocks
        factors = torch.empty(scales.shape, dtype=scales.dtype)
        self._shards.fill(key + SCALES, factors)
        first, stop = rows or (0, entry.shape[0])
        target = place.view(stop - first, entry.shape[1])
        step = max(1, _ROWS_AT_A_TIME // entry.shape[1] // height) * height
        for start in range(first, stop, step):
            end = min(start + step, stop)
            stored = torch.empty(end - start, entry.shape[1], dtype=entry.dtype)
            self._shards.fill(key, stored, (start, end))
            own = factors[start // height : -(-end // height)].float()
            own = own.repeat_interleave(height, 0)[start % height :][: end - start]
            own = own.repeat_interleave(width, 1)[:, : entry.shape[1]]
            target[start - first : end - first] = stored.float() * own

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> Any:
        """The bytes of tensors that are not scaled; None of others."""
        return None if key in self._scaled else self._shards.chunks(key, rows)
