"""What calibration measured of an image network: one importance per position of every axis, and per block.

Higher is more important. The names, with their shapes; `i` counts blocks from the first stage to the last:

- `blocks.{i}.{width}`: `(positions,)`, for each of `architecture.WIDTHS` that the block has
- `depth.{metric}`: `(number of blocks,)`, for a metric of `DEPTH_METRICS` that is no scan; of a Shapley value also with
  `.stderr` and `.ci95` after it
- `depth.scan_loss.{n}`: what is lost without the n blocks that begin at each position
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.pruning import scores as names
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan, Shapley
from megatron_ext.pruning.scores import Scores
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.pruning.axes import LAST, blocks_of, size


def width(block: int, name: str) -> str:
    """The name of the scores of one of `architecture.WIDTHS`."""
    return f"blocks.{block}.{name}"


class ImageScores(Scores):
    """Scores of an image network."""

    @staticmethod
    def shapes(model: Any) -> dict[str, tuple[int, ...]]:
        """Every score that it can have, and its shape."""
        blocks = blocks_of(model)
        found = {
            width(i, name): (size(model, block.stage, name),) for i, block in enumerate(blocks)
            for name in LAST[block.kind]
        }  # fmt: skip
        for name, metric in DEPTH_METRICS.items():
            if isinstance(metric, Scan):
                found |= {names.scan(name, n): (len(blocks) - n + 1,) for n in range(1, len(blocks))}
                continue
            details = (names.STDERR, names.INTERVAL) if isinstance(metric, Shapley) else ()
            found |= {names.depth(name) + detail: (len(blocks),) for detail in ("", *details)}
        return found

    @staticmethod
    def model_of(values: Mapping[str, Any]) -> MambaVision:
        """A network, from its fields."""
        return MambaVision(**values)
