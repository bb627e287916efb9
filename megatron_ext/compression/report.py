"""What a compression came to: sizes and losses of the three models, a page and a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.checkpoint.resume import architecture_on_disk
from megatron_ext.compression.stages import DISTILLED, EXPORTED, ORIGINAL, PRUNED
from megatron_ext.reports.metrics_file import finite, read_metrics
from megatron_ext.reports.provenance import git_commit, versions
from megatron_ext.workflow import Stage, command

NAMES = (ORIGINAL, PRUNED, DISTILLED)
COLORS_OF = {ORIGINAL: "teacher", PRUNED: "pruned", DISTILLED: "distilled"}


def collect(model: Path, out: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The numbers, from what the commands have left; `nan` for a loss that is not there or not finite."""
    models = {}
    for name in NAMES:
        if not (out / name).is_dir():
            continue
        architecture = architecture_on_disk(out / name)
        results = out / "validation" / name / "results.json"
        measured = json.loads(results.read_text()) if results.is_file() else {}
        metrics = out / name / "metrics.jsonl"
        steps = read_metrics(metrics) if metrics.is_file() else []
        models[name] = {
            "parameters": architecture.num_parameters(),
            "val_loss": math.nan if measured.get("val_loss") is None else measured["val_loss"],
            "tokens": int(steps[-1]["tokens"]) if steps else 0,
            "pattern": architecture.pattern,
            "history": [{key: step[key] for key in ("tokens", "loss", "val_loss") if key in step} for step in steps],
        }
    return {
        "model": str(model), "models": models, "seconds": dict(seconds), "versions": versions(), "commit": git_commit(),
    }  # fmt: skip


def headline(found: Mapping[str, Any]) -> str:
    """One sentence: how much smaller, and what it costs."""
    models = found["models"]
    original, last = models[ORIGINAL], models[DISTILLED if DISTILLED in models else PRUNED]
    share = last["parameters"] / original["parameters"]
    size = f"{original['parameters']:,} to {last['parameters']:,} parameters ({share:.0%})"
    lost = last["val_loss"] - original["val_loss"]
    if not math.isfinite(lost):
        return f"{size}; a loss is not finite"
    again = f", {models[PRUNED]['val_loss']:.3f} when it was cut" if DISTILLED in models else ""
    return f"{size}; validation loss {original['val_loss']:.3f} to {last['val_loss']:.3f}{again}, in nats per token"


def write(out: Path, found: Mapping[str, Any], stages: Sequence[Stage], launcher: Sequence[str]) -> None:
    """Write `compression.json`, `report.md` and `report.png`."""
    write_text(out / "compression.json", json.dumps(finite(found), indent=2, allow_nan=False) + "\n")
    draw(found, out / "report.png")
    rows = [
        f"| {name} | {model['parameters']:,} | {model['val_loss']:.4f} | {model['tokens']:,} |"
        for name, model in found["models"].items()
    ]
    lines = [
        f"# {Path(found['model']).name}, compressed", "", f"**{headline(found)}.**", "", "![losses](report.png)", "",
        "| | parameters | validation loss | tokens trained on |", "|---|---|---|---|", *rows, "",
        f"What was cut, and why: [{PRUNED}/report.md]({PRUNED}/report.md). The result: `{EXPORTED}/`.",
        "", "## What was run", "",
    ]  # fmt: skip
    for stage in stages:
        took = found["seconds"].get(stage.title)
        lines += [
            f"{stage.title}{'' if took is None else f', {took:,.0f} s'}:",
            "",
            "```bash",
            command(stage, launcher),
            "```",
            "",
        ]
    told = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines.append(f"{told}; commit {found['commit']}")
    write_text(out / "report.md", "\n".join(lines) + "\n")


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Draw the loss of the distilled model over its tokens, between those of the original and of what was cut."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from megatron_ext.reports.figures import COLORS, STYLE, count, label_ends, save

    models = found["models"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2))
        figure.subplots_adjust(left=0.1, right=0.8, bottom=0.13, top=0.9)
        ax = figure.subplots()
        history = models.get(DISTILLED, {}).get("history", [])
        end = max((step["tokens"] for step in history), default=1)
        ends = []
        for name in (ORIGINAL, PRUNED):
            if name in models and math.isfinite(models[name]["val_loss"]):
                loss, color = models[name]["val_loss"], COLORS[COLORS_OF[name]]
                ax.plot([0, end], [loss, loss], color=color, linestyle="--", linewidth=1.2)
                ends.append((end, loss, f"{name} {loss:.3f}", color))
        points = [(step["tokens"], step["val_loss"]) for step in history if step.get("val_loss") is not None]
        if DISTILLED in models and math.isfinite(models[DISTILLED]["val_loss"]):
            loss, color = models[DISTILLED]["val_loss"], COLORS["distilled"]
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, color=color, marker="o", markersize=4)
            ax.plot([end], [loss], color=color, marker="D")
            ends.append((end, loss, f"{DISTILLED} {loss:.3f}", color))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        ax.set_xlabel("tokens of distillation")
        ax.set_title("validation loss, nats per token; line: a few batches, diamond: the whole split")
        label_ends(ax, ends)
        save(figure, out)
