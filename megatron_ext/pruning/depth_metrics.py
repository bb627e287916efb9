"""The depth metrics, by which sub-layers or blocks are chosen: one entry of `DEPTH_METRICS` makes one.

Flags, checks, costs, names of scores and reports follow from the entry, also from one that another package adds:

    DEPTH_METRICS["largest_change"] = Change(lambda move: move.update.abs().amax(-1))

Shapes: s sequence (this rank's part), b micro-batch, h hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from megatron_ext.pruning.ablation import Outcome


class Move(NamedTuple):
    """What a sub-layer, or a block, does to the residual stream, in float32.

    Attributes:
        before: Its input.
        after: Its output.
        update: The difference.
        length: L2 norms of the input; zeros are not counted.
    """

    before: Float[Tensor, "s b h"]
    after: Float[Tensor, "s b h"]
    update: Float[Tensor, "s b h"]
    length: Float[Tensor, "s b"]


@dataclass(frozen=True)
class Change:
    """How much it changes the residual stream, averaged over tokens: seen while widths are measured, at no cost.

    Attributes:
        of: The change of each token, `(s, b)`; must not write into the move.
    """

    of: Callable[[Move], Float[Tensor, "s b"]]
    logits = False


@dataclass(frozen=True)
class LeaveOut:
    """What the model loses without it alone.

    Attributes:
        worse: How bad an outcome is; that of the whole model is subtracted.
        logits: Whether this needs the logits compared.
    """

    worse: "Callable[[Outcome], float]"
    logits: bool = False


@dataclass(frozen=True)
class Shapley:
    """What the model loses without it on average over sub-networks, sampled."""

    worse: "Callable[[Outcome], float]"
    logits: bool = False


@dataclass(frozen=True)
class Scan:
    """What the model loses without the run of sub-layers, or blocks, that begins with it.

    Attributes:
        worse: As above; None for a task's score (`--prune-task`).
    """

    worse: "Callable[[Outcome], float] | None"
    logits: bool = False


DepthMetric = Change | LeaveOut | Shapley | Scan


def block_influence(move: Move) -> Float[Tensor, "s b"]:
    """1 - cos(x, y) of input and output (arXiv 2407.14679); 1 for a stream that becomes zero."""
    new_length = move.after.norm(dim=-1)
    # Without its cancellation: half the squared distance of the two unit vectors.
    turn = (move.after / new_length[..., None]).sub_(move.before / move.length[..., None]).square().sum(-1) / 2
    return torch.where(new_length > 0, turn, 1.0)


def relative_l1(move: Move) -> Float[Tensor, "s b"]:
    """||y - x||_1 / ||x||_1 ("A deeper look at depth pruning of LLMs", arXiv 2407.16286)."""
    return move.update.abs().sum(-1) / move.before.abs().sum(-1)


def relative_l2(move: Move) -> Float[Tensor, "s b"]:
    """||y - x||_2 / ||x||_2 (the same)."""
    return move.update.norm(dim=-1) / move.length


DEPTH_METRICS: dict[str, DepthMetric] = {
    "block_influence": Change(block_influence),
    "relative_l1": Change(relative_l1),
    "relative_l2": Change(relative_l2),
    "loss": LeaveOut(attrgetter("loss")),
    "logit_mse": LeaveOut(attrgetter("logit_mse"), logits=True),
    "logit_distance": LeaveOut(attrgetter("logit_distance"), logits=True),
    "shapley_loss": Shapley(attrgetter("loss")),
    "shapley_logit_distance": Shapley(attrgetter("logit_distance"), logits=True),
    "scan_loss": Scan(attrgetter("loss")),
    "scan_task": Scan(None),
}


def changes() -> dict[str, Change]:
    """The metrics that are measured in any case."""
    return {name: metric for name, metric in DEPTH_METRICS.items() if isinstance(metric, Change)}
