"""`report.html`: a plan as a page to look at: every sub-layer, its axes by importance, what is kept of each.

One file, and several plans side by side. Nothing is loaded from elsewhere, and nothing runs: HTML and SVG.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import PlanError
from megatron_ext.models.cost import Workload
from megatron_ext.models.pattern import KINDS
from megatron_ext.pruning import report
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.plan import PRUNED_AXES, Plan, PrunedAxis
from megatron_ext.pruning.pruned_family import Loss
from megatron_ext.pruning.scores import Scores
from megatron_ext.reports.figures import COLORS

KEPT, DROPPED = COLORS["distilled"], COLORS["pruned"]
WIDTH, HEIGHT, BINS = 220, 22, 110
LABELS = {
    "ffn": "neurons", "kv_groups": "key/value groups", "query_heads": "query heads", "mamba_groups": "SSM groups",
    "mamba_heads": "Mamba-2 heads", "head_channels": "head channels", "states": "states", "experts": "experts",
    "expert_ffn": "expert neurons", "shared_ffn": "shared neurons",
}  # fmt: skip
STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 0; background: #fafafa; }}
main {{ display: grid; grid-auto-flow: column; grid-auto-columns: minmax(740px, 1fr); gap: 24px; padding: 24px; }}
h1 {{ font-size: 20px; margin: 0 0 2px; overflow-wrap: anywhere; }} h2 {{ font-size: 15px; margin: 22px 0 6px; }}
p {{ margin: 2px 0 10px; color: #555; }}
table {{ border-collapse: collapse; width: 100%; background: #fff; }}
td, th {{ padding: 3px 8px; text-align: left; border-bottom: 1px solid #eee; font-weight: normal; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.layers td {{ vertical-align: middle; }} .gone td {{ background: #fbeee6; }}
.kind {{ font-weight: 600; white-space: nowrap; }} .gone .kind {{ text-decoration: line-through; }}
.axis {{ display: flex; align-items: center; gap: 8px; margin: 2px 0; }}
.axis span {{ color: #555; font-size: 12px; white-space: nowrap; }}
svg {{ display: block; flex: none; shape-rendering: crispEdges; }}
.legend b {{ display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 12px; }}
.kept {{ background: {KEPT}; }} .dropped {{ background: {DROPPED}; }}
@media print {{ body {{ background: #fff; }} tr {{ break-inside: avoid; }} }}
"""


@dataclass(frozen=True)
class View:
    """A plan and what is known of it.

    Attributes:
        name: For people, such as the run directory's.
        plan: What is kept.
        scores: What it was made by, if that is known; of the first round.
        losses: Of the original and of what it became.
        workload: What caches are counted for.
    """

    name: str
    plan: Plan
    scores: Scores | None = None
    losses: Sequence[Loss] = ()
    workload: Workload = field(default_factory=Workload)


def of_directory(directory: Path) -> View:
    """The view of what a pruning job has left.

    Raises:
        PlanError: There is no plan of a language model, or it, its scores or its losses cannot be read.
    """
    plan = Plan.load(directory / "plan.json")
    scores, losses = directory / "scores.safetensors", directory / "losses.json"
    try:
        found = [Loss(**each) for each in json.loads(losses.read_text())] if losses.is_file() else []
    except (ValueError, TypeError) as error:
        raise PlanError("the losses of a pruning job cannot be read", got=f"{losses}: {error}") from error
    return View(directory.name, plan, Scores.load(scores) if scores.is_file() else None, found)


def page(views: Sequence[View]) -> str:
    """The page of one plan, or of several side by side."""
    title = escape(" and ".join(view.name for view in views))
    columns = "".join(f"<section>{_view(view)}</section>" for view in views)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>{columns}</main></body></html>\n'


def _view(view: View) -> str:
    before, after = view.plan.source.num_parameters(), view.plan.target.num_parameters()
    what = f"{before:,} to {after:,} parameters, {after / before:.0%}"
    metric = f"Scores: {escape(view.plan.provenance.metric)}." if view.plan.provenance.metric else ""
    return "".join(
        [
            f"<h1>{escape(view.name)}</h1><p>{what}. {metric}</p>",
            _table([row.cells() for row in report.size_rows(view.plan.source, view.plan.target, view.workload)]),
            _losses(view.losses),
            "<h2>The residual stream</h2>",
            _axis("hidden channels", _of(view.scores, names.HIDDEN), view.plan.hidden, view.plan.source.hidden_size),
            '<h2>Sub-layers</h2><p class="legend">Positions by importance, the most important first:'
            '<b class="kept"></b>kept<b class="dropped"></b>dropped</p>',
            _layers(view),
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "<tr><th></th><th class=n>before</th><th class=n>after</th><th class=n>kept</th></tr>"
    lines = ("".join(f"<td{' class=n' if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _losses(losses: Sequence[Loss]) -> str:
    """What each round costs in loss, as bars from the original's."""
    if not losses:
        return ""
    least, most = min(loss.nats for loss in losses), max(loss.nats for loss in losses)
    span = (most - least) or 1.0
    rows = "".join(
        f"<tr><td>{escape(loss.name)}</td><td class=n>{loss.parameters:,}</td><td class=n>{loss.nats:.4f}</td>"
        f'<td><svg width="160" height="10"><rect width="{3 + 150 * (loss.nats - least) / span:.0f}" height="10" '
        f'fill="{DROPPED if number else KEPT}"/></svg></td></tr>'
        for number, loss in enumerate(losses)
    )
    title = "<h2>Loss on the calibration data, nats per token, before any retraining</h2>"
    return f"{title}<table>{rows}</table>"


def _layers(view: View) -> str:
    """A row for each sub-layer of the original."""
    plan, depth = view.plan, _depth(view)
    most = max((abs(value) for value in depth.values()), default=0.0) or 1.0
    rows = []
    for i, kind in enumerate(plan.source.pattern):
        stays = i in plan.units
        stands = next((first for first, gone in plan.emulated.items() if i in gone), None)
        state = "" if stays else " dropped" if stands is None else " dropped, emulated"
        value = depth.get(i)
        bar = "" if value is None else (
            f'<svg width="90" height="10"><title>{value:.5g}</title><rect width="{1 + 88 * abs(value) / most:.0f}" '
            f'height="10" fill="{KEPT if stays else DROPPED}"/></svg>'
        )  # fmt: skip
        shown = "" if value is None else f"{value:.4g}"
        axes = "".join(_axes(view, i)) if stays else ""
        rows.append(
            f'<tr class="{"" if stays else "gone"}"><td class=n>{i}</td><td class=kind>{escape(KINDS.get(kind, kind))}'
            f"{state}</td><td class=n>{shown}</td><td>{bar}</td><td>{axes}</td></tr>"
        )
    what = escape(str(_metric(view)).replace("_", " ")) if depth else ""
    head = f"<tr><th></th><th></th><th colspan=2>{what}</th><th></th></tr>"
    return f'<table class="layers">{head}{"".join(rows)}</table>'


def _metric(view: View) -> Any:
    return view.scores.settings.get("depth_metric", "depth") if view.scores is not None else None


def _depth(view: View) -> dict[int, float]:
    """The depth score of each sub-layer, where sub-layers or blocks were scored one by one."""
    if view.scores is None or (metric := _metric(view)) is None:
        return {}
    arch, values = view.plan.source, view.scores.values
    by_blocks = view.scores.settings.get("blocks") and names.depth(metric, blocks=True) in values
    if (found := values.get(names.depth(metric))) is not None and not by_blocks:
        return dict(enumerate(found.tolist()))
    if (found := values.get(names.depth(metric, blocks=True))) is not None:
        ends = np.cumsum([len(block) for block in arch.layers.blocks])
        return {i: found[int(np.searchsorted(ends, i, side="right"))].item() for i in range(len(arch.pattern))}
    scored: dict[int, float] = {}
    for kind in set(arch.pattern):
        if (found := values.get(names.depth(metric, kind=kind))) is not None:
            own = [i for i, unit in enumerate(arch.pattern) if unit == kind]
            scored |= dict(zip(own, found.tolist(), strict=True))
    return scored


def _axes(view: View, layer: int) -> Iterator[str]:
    """The axes of a sub-layer that stays, of those that are cut or scored."""
    plan, own = view.plan, view.plan.source.at(layer)
    for axis in PRUNED_AXES:
        if axis.kind != plan.source.pattern[layer]:
            continue
        kept, values = getattr(plan, axis.field).get(layer), _axis_scores(view.scores, axis, layer, own)
        if axis.groups is not None and kept is None and axis.kept_groups is not None:
            groups = getattr(plan, axis.kept_groups).get(layer)
            per_group = axis.positions(own) // axis.num_groups(own)
            if groups is not None:
                kept = tuple(group * per_group + i for group in groups for i in range(per_group))
        if (kept is not None or values is not None) and axis.positions(own) > 1:
            yield _axis(LABELS[axis.field], values, kept, axis.positions(own))


def _axis_scores(scores: Scores | None, axis: PrunedAxis, layer: int, own: Any) -> NDArray[np.float64] | None:
    """One number for each position of an axis."""
    match axis.field:
        case "ffn":
            return _of(scores, names.ffn(layer))
        case "query_heads":
            return _of(scores, names.query_head(layer))
        case "kv_groups":
            heads = _of(scores, names.query_head(layer))
            return None if heads is None else heads.reshape(own.num_query_groups, -1).sum(1)
        case "mamba_heads" | "head_channels" | "mamba_groups":
            found = _of(scores, names.mamba(layer))
            if found is None:
                return None
            if axis.field == "head_channels":
                return found.sum(0)
            return found.reshape(axis.positions(own), -1).sum(1)
        case "states":
            found = _of(scores, names.state(layer))
        case "experts":
            found = _of(scores, names.expert(layer))
        case "expert_ffn":
            found = _of(scores, names.expert_ffn(layer))
        case _:
            found = _of(scores, names.shared_ffn(layer))
    return None if found is None else found.ravel()


def _of(scores: Scores | None, name: str) -> NDArray[np.float64] | None:
    found = None if scores is None else scores.values.get(name)
    return None if found is None else found.double().numpy()


def _axis(label: str, values: NDArray[np.float64] | None, kept: Sequence[int] | None, size: int) -> str:
    """A strip: positions from left to right by importance, as high as that is, blue where they stay."""
    stays = np.ones(size, bool)
    if kept is not None:
        stays[:] = False
        stays[list(kept)] = True
    heights = np.ones(size) if values is None else np.abs(values)
    order = np.lexsort((-heights, ~stays)) if values is None else np.argsort(-heights, kind="stable")
    parts = np.array_split(order, min(size, BINS))
    most, place = heights.max() or 1.0, 0.0
    bars = []
    for part in parts:
        width = WIDTH * len(part) / size
        tall = max(1.5, HEIGHT * heights[part].mean() / most)
        blue = tall * stays[part].mean()
        for color, top, high in ((KEPT, HEIGHT - blue, blue), (DROPPED, HEIGHT - tall, tall - blue)):
            if high > 0:
                bars.append(
                    f'<rect x="{place:.2f}" y="{top:.2f}" width="{width:.2f}" height="{high:.2f}" fill="{color}"/>'
                )
        place += width
    count = int(stays.sum())
    share = "" if values is None or not heights.sum() else f", {heights[stays].sum() / heights.sum():.0%} of the score"
    text = f"{label} {count:,} of {size:,}{share}"
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{text}">{"".join(bars)}</svg>'
    return f'<div class="axis">{svg}<span>{text}</span></div>'
