"""What a smaller image network should be: shares asked for, or a budget that one share is found for; and the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.errors import PlanError
from megatron_ext.pruning.saved_plan import Provenance, differences
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import keep, top
from megatron_ext.vision.architecture import WIDTHS, MambaVision
from megatron_ext.vision.pruning import scores as names
from megatron_ext.vision.pruning.axes import LAST, blocks_of, size
from megatron_ext.vision.pruning.plan import ImagePlan, pruned

GRID = 64  # shares that are tried for a budget
_FLAGS = {"conv": "conv-channels", "heads": "attention-heads", "inner": "mixer-channels", "hidden": "mlp-channels"}


@dataclass(frozen=True)
class ImageTargets:
    """What is asked for.

    Attributes:
        shares: Of the positions of each width the share to keep; the others stay whole, or are found for the budget.
        params: A number of parameters: up to 1.0 a fraction of the original's, above it a count; None for none.
        blocks: How many blocks to keep; None for all.
        depth_metric: By which they are chosen.
        divisor: What numbers of channels are multiples of.
    """

    shares: Mapping[str, float]
    params: float | None = None
    blocks: int | None = None
    depth_metric: str = "loss"
    divisor: int = 8

    def check(self, model: MambaVision) -> None:
        """Check that it can be cut out of a network.

        Raises:
            PlanError: A share is none, a network has no such axis, or nothing is asked for.
        """
        if not self.shares and self.params is None and self.blocks is None:
            legal = "a budget such as --prune-target-params 0.5, a share such as --prune-mlp-channels 0.5, or blocks"
            raise PlanError("no target given", legal=legal)
        there = {width for block in blocks_of(model) for width in LAST[block.kind]}
        for width, share in self.shares.items():
            if not 0 < share <= 1:
                raise PlanError(f"--prune-{_FLAGS[width]} is a share", got=share, legal="more than 0, at most 1")
            if width not in there:
                raise PlanError(f"--prune-{_FLAGS[width]}: the network has none", got=model.pattern)
        if self.params is not None and self.params <= 0:
            raise PlanError("--prune-target-params must be positive", got=self.params)
        if self.divisor < 1:
            raise PlanError("--prune-divisor must be positive", got=self.divisor)
        count = len(blocks_of(model))
        if self.blocks is not None and not 1 <= self.blocks <= count:
            raise PlanError("--prune-blocks", got=self.blocks, legal=f"1 to {count}")

    def resolve(self, model: MambaVision, units: Sequence[int]) -> MambaVision:
        """What the network becomes if these blocks stay.

        Raises:
            PlanError: The budget cannot be reached.
        """
        if self.params is None:
            return self._cut(model, units, 1.0)
        budget = self.params * model.num_parameters() if self.params <= 1 else self.params
        for step in range(GRID, 0, -1):
            target = self._cut(model, units, step / GRID)
            if target.num_parameters() <= budget:
                return target
        least = self._cut(model, units, 1 / GRID).num_parameters()
        legal = f"at least {least:,}: the channels of stages stay; fewer with --prune-blocks"
        raise PlanError("the budget cannot be reached", got=f"{budget:,.0f} parameters", legal=legal)

    def _cut(self, model: MambaVision, units: Sequence[int], share: float) -> MambaVision:
        """With this share of each width for which none is asked."""
        blocks, counts = blocks_of(model), {width: dict[int, int]() for width in WIDTHS}
        for number in units:
            for width in LAST[blocks[number].kind]:
                whole = size(model, blocks[number].stage, width)
                step = 1 if width == "heads" or whole % self.divisor else self.divisor
                most = whole // step
                counts[width][number] = step * min(most, max(1, round(self.shares.get(width, share) * most)))
        return pruned(model, units, counts)


def make_plan(scores: Scores, model: MambaVision, targets: ImageTargets, path: str = "") -> ImagePlan:
    """The plan that keeps the blocks and, in each, the positions of the highest scores; of equal ones, the first.

    Args:
        scores: The scores of `model`.
        model: The network to be cut.
        targets: What to cut it to.
        path: Of the scores, recorded in the provenance.

    Raises:
        PlanError: The scores belong to another network or lack something, or the targets cannot be reached.
    """
    if wrong := differences(scores.architecture, model):
        raise PlanError("the scores belong to another network", got=wrong)
    targets.check(model)
    blocks = blocks_of(model)
    units = tuple(range(len(blocks)))
    if targets.blocks is not None:
        units = keep(scores, targets.depth_metric, len(blocks), targets.blocks)
    target = targets.resolve(model, units)
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for number in units:
        stage = blocks[number].stage
        for width in LAST[blocks[number].kind]:
            count = size(target, stage, width)
            if count < size(model, stage, width):
                kept.setdefault(width, {})[number] = top(scores[names.width(number, width)], count)
    return ImagePlan(
        source=model, target=target, units=units, kept=kept,
        provenance=Provenance(
            model=scores.model, iteration=scores.iteration, fingerprint=scores.fingerprint, scores=path,
            data=scores.data, seed=scores.seed, metric=scores.metric,
        ),
    )  # fmt: skip
