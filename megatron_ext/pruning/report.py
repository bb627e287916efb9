"""What pruning changes, to read and to look at: the table before and after, and the plots of a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from megatron_ext.models import cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import Workload
from megatron_ext.models.pattern import ATTENTION, KINDS, MAMBA, MLP, MOE
from megatron_ext.pruning import recovery
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.pruned_family import Loss
from megatron_ext.pruning.scores import BLOCKS, INTERVAL, OF_KIND, STDERR, Scores, mamba, scan

PANELS = 36
ENOUGH = 20  # tokens to a channel, for a linear map
_AXES = {
    "ffn": "FFN neurons", "query_head": "query heads", "mamba_head": "Mamba-2 heads", "expert": "experts",
    "shared_ffn": "neurons of the shared expert",
}  # fmt: skip
_OF_A_LAYER = re.compile(r"layers\.(\d+)\.")
_SIZES = (
    ("hidden channels", "hidden_size", ""), ("FFN neurons", "ffn_hidden_size", MLP),
    ("key/value groups", "num_query_groups", ATTENTION), ("query heads", "num_attention_heads", ATTENTION),
    ("SSM groups", "mamba_num_groups", MAMBA), ("Mamba-2 heads", "mamba_num_heads", MAMBA),
    ("channels of a Mamba-2 head", "mamba_head_dim", MAMBA), ("states of an SSM group", "mamba_state_dim", MAMBA),
    ("experts", "num_experts", MOE), ("neurons of an expert", "moe_ffn_hidden_size", MOE),
    ("neurons of the shared expert", "moe_shared_expert_intermediate_size", MOE),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: what, before, after; counts, or bytes."""

    name: str
    before: float
    after: float
    in_bytes: bool = False

    def cells(self) -> tuple[str, str, str, str]:
        """As text, with the share that is kept."""
        show = _bytes if self.in_bytes else _count
        return self.name, show(self.before), show(self.after), f"{self.after / self.before:.0%}"


def size_rows(source: Architecture, target: Architecture, workload: Workload) -> list[Row]:
    """The table: parameters, what serving needs, and every axis that the source has."""
    served = f"at {workload.batch} x {workload.context:,} tokens"
    both = (source, target)

    def row(name: str, measure: Any, in_bytes: bool = False) -> Row:
        return Row(name, *(measure(arch) for arch in both), in_bytes=in_bytes)

    rows = [
        row("parameters", lambda a: a.num_parameters()),
        row("without embeddings", lambda a: a.num_parameters(embedding=False)),
        row("16-bit weights", lambda a: cost.BYTES * a.num_parameters(), True),
        row("KV cache per token", cost.kv_bytes_per_token, True),
        row("SSM cache per sequence", cost.state_bytes_per_sequence, True),
        row(f"weights and caches {served}", lambda a: cost.memory_bytes(a, workload), True),
        row(f"read and written per decoded token {served}", lambda a: cost.decode_bytes_per_token(a, workload), True),
        row("layers", lambda a: len(a.layers.blocks)),
    ]
    if source.num_experts:
        rows.insert(2, row("parameters that a token uses", lambda a: a.num_active_parameters()))
    if set(source.pattern) != {MAMBA} and len(source.layers.blocks) != len(source.pattern):
        rows += [row(f"{KINDS[k]} sub-layers", lambda a, k=k: a.pattern.count(k)) for k in KINDS]
    for name, field, kind in _SIZES:
        if kind in source.pattern and kind in target.pattern:
            rows.append(row(name, lambda a, f=field: _mean_size(a, f)))
    return [entry for entry in rows if entry.before]


def markdown(
    plan: Plan, workload: Workload, scores: Sequence[Scores] = (), losses: Sequence[Loss] = (), remark: str = ""
) -> str:
    """`report.md`."""
    lines = ["# Pruned", "", *_origin(plan, scores), "| | before | after | kept |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in size_rows(plan.source, plan.target, workload)]
    lines += ["", f"Pattern `{plan.source.pattern}` to `{plan.target.pattern}`."]
    for name, sizes in plan.target.layer_sizes.items():
        lines += [f"`{name}` layer by layer: {', '.join(map(str, sizes))}."]
    lines += loss_lines(losses)
    lines += recovery_lines(plan)
    for number, each in enumerate(scores, start=1):
        if each.task is not None:
            lines += _task(each, f" in round {number}" if len(scores) > 1 else "")
    if remark:
        lines += ["", remark]
    lines += ["", "Each sub-layer and what was cut of it, to look at: [report.html](report.html)."]
    lines += ["", "![scores of every axis](importance.png)"] if scores else []
    lines += ["", "![what it costs in loss](loss.png)"] if losses else []
    return "\n".join(lines) + "\n"


def _origin(plan: Plan, scores: Sequence[Scores]) -> list[str]:
    """What was cut, by which scores, measured on what."""
    made = plan.provenance
    parts = [f"From `{made.model}`, step {made.iteration}." if made.model else ""]
    parts.append(f"Scores: {made.metric}." if made.metric else "")
    if scores and scores[0].samples:
        parts.append(f"Measured on {scores[0].samples:,} sequences of `{scores[0].data}`, seed {scores[0].seed}.")
    text = " ".join(filter(None, parts))
    return [f"{text} Every flag of the command: [config.yaml](config.yaml).", ""] if text else []


def recovery_lines(plan: Plan) -> list[str]:
    """What stands for dropped sub-layers, and how much of them it is."""
    how = plan.recovery
    if how is None:
        return []
    rows = recovery.table(plan.source.pattern, plan.emulated, plan.emulators)
    what = "their mean update" if how.method == "bias" else f"a linear map of rank {how.rank} and a bias"
    where = "in the output biases below" if how.into == "biases" else "a sub-layer of its own each"
    text = f"In place of dropped sub-layers: {what}, {where}, fitted on the {how.stream} stream of {how.samples:,} "
    text += "sequences. `mean`: the share of the update's mean square that a bias is; by rank, the share of its "
    text += "variance that the best linear map of that rank explains on these sequences."
    if how.rank and how.tokens < ENOUGH * plan.source.hidden_size:
        text += f" With fewer than {ENOUGH} tokens to a channel ({how.tokens:,} in all) that flatters them."
    lines = ["", text, "", "| " + " | ".join(rows[0]) + " |", "|---|---" + "|---:" * (len(rows[0]) - 2) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows[1:]]


def loss_lines(losses: Sequence[Loss], per: str = "token") -> list[str]:
    """The models on the way, and their losses."""
    if not losses:
        return []
    lines = ["", "Loss on the calibration data, before any retraining:", ""]
    lines += [f"| | parameters | nats per {per} |", "|---|---:|---:|"]
    return lines + [f"| {loss.name} | {loss.parameters:,} | {loss.nats:.4f} |" for loss in losses]


def _task(scores: Scores, when: str) -> list[str]:
    """What each contiguous run of layers or sub-layers is worth in the task's score."""
    assert scores.task is not None
    settings, run = scores.settings, int(scores.settings["run"])
    lost = scores[scan("scan_task", run, blocks=settings["blocks"])].tolist()
    what, best = "layers" if settings["blocks"] else "sub-layers", lost.index(min(lost))
    lines = [
        "",
        f"Score ({settings['task_metric']}) at the task `{settings['task']}`{when}, before any retraining:",
        "",
    ]
    lines += [f"| without {what} | score |", "|---|---:|", f"| none | {scores.task:.4f} |"]
    for first, loss in enumerate(lost):
        gone = f"{first} to {first + run - 1}" if run > 1 else f"{first}"
        lines += [f"| {gone}{' (the least lost)' if first == best else ''} | {scores.task - loss:.4f} |"]
    return lines


def plot_scores(scores: Scores, plan: Plan, path: Path) -> None:
    """`importance.png`: the scores of every axis, kept and dropped."""
    from megatron_ext.pruning.pictures import plot_importance

    shown = {name: value for name, value in scores.values.items() if value.dim() == 1 and not _is_detail(name)}
    kept: dict[str, Any] = {"hidden": list(plan.hidden or range(plan.source.hidden_size))}
    staying = [i for i, block in enumerate(plan.source.layers.blocks) if set(block) <= set(plan.units)]
    for name in shown:
        if name.startswith("depth."):
            kept[name] = staying if name.endswith(BLOCKS) else list(plan.units)
            for kind, ending in OF_KIND.items():
                if name.endswith(ending):
                    kept[name] = [p for p, i in enumerate(plan.source.layers.indices(kind)) if i in plan.units]
    for axis, values in (
        ("ffn", plan.ffn), ("query_head", plan.query_heads), ("mamba_head", plan.mamba_heads),
        ("expert", plan.experts), ("shared_ffn", plan.shared_ffn),
    ):  # fmt: skip
        kept |= {f"layers.{layer}.{axis}": list(indices) for layer, indices in values.items()}
    for layer in plan.source.layers.indices(MAMBA):
        channels = list(plan.head_channels.get(layer, range(plan.source.mamba_head_dim)))
        shown[f"layers.{layer}.mamba_head"] = scores[mamba(layer)][:, channels].norm(dim=1)
    for name in shown:
        if (match := _OF_A_LAYER.match(name)) and int(match[1]) not in plan.units:
            kept[name] = []  # gone with its layer
    layers = [name for name in shown if _OF_A_LAYER.match(name)]
    step = max(1, ceil(len(layers) / PANELS))
    hidden_panels = set(layers) - set(layers[::step])  # of a deep model, every so many
    panels = sorted((name for name in shown if name not in hidden_panels), key=lambda name: name.startswith("depth."))
    titles = {name: title(name) for name in panels}
    plot_importance(
        {titles[name]: shown[name] for name in panels},
        {titles.get(name, name): own for name, own in kept.items()},
        path,
    )


def title(name: str) -> str:
    """A score's name for people: `layers.3.ffn` is `3: FFN neurons`."""
    if match := _OF_A_LAYER.match(name):
        axis = name[match.end() :]
        return f"{match[1]}: {_AXES.get(axis, axis.replace('_', ' '))}"
    if not name.startswith("depth."):
        return "hidden channels" if name == "hidden" else name
    metric, _, of = name.removeprefix("depth.").partition(".")
    return f"{metric.replace('_', ' ')} of {'layers' if of == BLOCKS[1:] else f'{of} sub-layers'.strip()}"


def _is_detail(name: str) -> bool:
    """Scores that a picture would not gain by."""
    return name.endswith((STDERR, INTERVAL)) or name.startswith("depth.scan_")


def _mean_size(arch: Architecture, field: str) -> float:
    sizes = arch.layer_sizes.get(field)
    return sum(sizes) / len(sizes) if sizes else getattr(arch, field)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f} on average"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f} B"
