"""What pruning changes of an image network, to read and to look at."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ext.pruning.pruned_family import Loss
from megatron_ext.pruning.report import Row, loss_lines
from megatron_ext.pruning.scores import Scores
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.pruning import scores as names
from megatron_ext.vision.pruning.axes import LAST, blocks_of, size
from megatron_ext.vision.pruning.plan import ImagePlan

PANELS = 36
_NAMES = {
    "conv": "channels inside convolution blocks", "heads": "attention heads", "inner": "channels of a mixer's branch",
    "hidden": "hidden channels of an MLP",
}  # fmt: skip


def size_rows(source: MambaVision, target: MambaVision) -> list[Row]:
    """The table: parameters, operations, blocks, and each width summed over blocks."""
    both = (source, target)

    def row(name: str, measure: Callable[[MambaVision], float], in_bytes: bool = False) -> Row:
        return Row(name, *(measure(model) for model in both), in_bytes=in_bytes)

    def total(model: MambaVision, width: str) -> int:
        return sum(size(model, block.stage, width) for block in blocks_of(model) if width in LAST[block.kind])

    rows = [
        row("parameters", lambda m: m.num_parameters()),
        row("16-bit weights", lambda m: 2 * m.num_parameters(), True),
        row("multiply-adds an image", lambda m: sum(m.multiply_adds().values())),
        row("blocks", lambda m: len(blocks_of(m))),
    ]
    rows += [row(f"{name}, in all", lambda m, w=width: total(m, w)) for width, name in _NAMES.items()]
    return [entry for entry in rows if entry.before]


def markdown(plan: ImagePlan, losses: Sequence[Loss] = (), remark: str = "") -> str:
    """`report.md`."""
    lines = ["# Pruned", "", "| | before | after | kept |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in size_rows(plan.source, plan.target)]
    lines += ["", f"Pattern `{plan.source.pattern}` to `{plan.target.pattern}`."]
    if plan.target.widths:
        lines += [f"Widths by stage, - where one is whole: `{plan.target.widths}`."]
    lines += loss_lines(losses, "image")
    if remark:
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def plot_scores(scores: Scores, plan: ImagePlan, path: Path) -> None:
    """`importance.png`: the scores of every axis, kept and dropped."""
    from megatron_ext.pruning.pictures import plot_importance

    depth = [name for name in scores.values if name in (f"depth.{m}" for m in ("loss", "block_influence"))]
    widths = [name for name in scores.values if name.startswith("blocks.")]
    step = -(-len(widths) // PANELS)  # of a deep network, every so many
    shown = {name: scores.values[name] for name in (*depth, *widths[:: max(1, step)])}
    kept: dict[str, Sequence[int]] = dict.fromkeys(depth, plan.units)
    for number, block in enumerate(blocks_of(plan.source)):
        for width in LAST[block.kind]:
            if number not in plan.units:
                kept[names.width(number, width)] = ()  # gone with its block
            elif number in plan.kept.get(width, {}):
                kept[names.width(number, width)] = plan.kept[width][number]
    plot_importance(shown, kept, path)
