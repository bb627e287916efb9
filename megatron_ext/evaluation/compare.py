"""`megatron-ext compare`: several checkpoints side by side, from their `results.json` and what the checkpoints say."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.results import CHECKPOINT, FILE, read_results
from megatron_ext.models import cost
from megatron_ext.models.config import Architecture

SERVED = cost.Workload(batch=1, context=8192)
COUNTED = ("samples", "num_fewshot", "version")  # beside the metrics of a task


@dataclass(frozen=True)
class Run:
    """One checkpoint and what was measured of it.

    Attributes:
        name: For people; no other run has it.
        architecture: The model.
        results: Of its `results.json`; `val_loss` also from the training's log.
    """

    name: str
    architecture: Architecture
    results: dict[str, Any]

    @classmethod
    def read(cls, path: Path, name: str) -> "Run":
        """From a run directory, or the `--save` of an evaluation.

        Raises:
            DataError: There is neither a checkpoint nor results.
            CheckpointError: The checkpoint is damaged.
        """
        results: dict[str, Any] = read_results(path)
        if (path / "metrics.jsonl").is_file():
            results = _validated(path / "metrics.jsonl") | results
        if "architecture" in results.get(CHECKPOINT, {}):
            return cls(name, Architecture.from_dict(results[CHECKPOINT]["architecture"]), results)
        if not path.is_dir() or not (has_checkpoint(path) or (path / "metadata.json").is_file()):
            raise DataError("neither a checkpoint nor results", got=path, legal=f"a directory with one, or with {FILE}")
        return cls(name, layout.architecture(layout.find(path).path), results)


def _validated(log: Path) -> dict[str, Any]:
    """The last validation loss of a training."""
    found: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)
        except ValueError:
            break  # a training that was killed while it wrote
        if step.get("val_loss") is not None:
            found = {"val_loss": step["val_loss"]}
    return found


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(own[-length:]) for own in parts]
        if len(set(short)) == len(short):
            return short
    raise ConfigError("a run is given twice", got=", ".join(map(str, paths)))


Row = tuple[str, list[str]]


def rows(runs: Sequence[Run]) -> list[Row]:
    """What is compared, and what each run has of it; "-" where it was not measured."""
    found = _facts(runs)
    losses = [run.results.get("val_loss") for run in runs]
    if any(loss is not None for loss in losses):
        found.append(("validation loss, nats per token", _shown(losses, "{:.4f}")))
    found += _text(runs)
    for task, metric in _metrics(runs):
        values = [run.results.get("tasks", {}).get(task, {}).get(metric) for run in runs]
        found.append((f"{task}: {metric}", _shown(values, "{:.4f}")))
    for suite in _keys(runs, "synthetic"):
        for length in sorted({int(n) for run in runs for n in run.results.get("synthetic", {}).get(suite, {})}):
            cells = [run.results.get("synthetic", {}).get(suite, {}).get(str(length), {}) for run in runs]
            found.append((f"{suite} at {length:,}", _shown([cell.get("accuracy") for cell in cells], "{:.0%}")))
    for what in ("prefill", "decode"):
        for length in sorted(map(int, _keys(runs, "speed"))):
            cells = [run.results.get("speed", {}).get(str(length), {}) for run in runs]
            values = [cell.get(f"{what}_tokens_per_second") for cell in cells]
            batches = {(cell["batch_size"], cell["ranks"]) for cell in cells if cell}
            note = "" if len(batches) == 1 else " (unequal batches or ranks)"
            found.append((f"{what} at {length:,}, tokens/s{note}", _shown(values, "{:,.1f}")))
    return found


def _facts(runs: Sequence[Run]) -> list[Row]:
    archs = [run.architecture for run in runs]
    active = [arch.num_active_parameters() for arch in archs]
    parameters = [arch.num_parameters() for arch in archs]
    found = [("layers", [arch.pattern for arch in archs]), ("parameters", [f"{count:,}" for count in parameters])]
    if active != parameters:
        found.append(("parameters that a token uses", [f"{count:,}" for count in active]))
    found += [
        ("weights in 16 bits, MB", [f"{cost.BYTES * count / 1e6:,.1f}" for count in parameters]),
        (
            f"memory at {SERVED.context:,} tokens, MB",
            [f"{cost.memory_bytes(arch, SERVED) / 1e6:,.1f}" for arch in archs],
        ),
        ("KV cache per token, bytes", [f"{cost.kv_bytes_per_token(arch):,}" for arch in archs]),
        ("SSM states per sequence, bytes", [f"{cost.state_bytes_per_sequence(arch):,}" for arch in archs]),
    ]
    return found


def _text(runs: Sequence[Run]) -> list[Row]:
    texts, note = [run.results.get("text", {}) for run in runs], text_note(runs)
    if not any(texts):
        return []
    return [
        (f"text: bits per byte{note}", _shown([text.get("bits_per_byte") for text in texts], "{:.4f}")),
        (f"text: loss, nats per token{note}", _shown([text.get("loss") for text in texts], "{:.4f}")),
    ]


def text_note(runs: Sequence[Run]) -> str:
    """What is to be said where not all runs were measured on one text in one way."""
    texts = [run.results["text"] for run in runs if run.results.get("text")]
    alike = len({(text["bytes"], text["size"], text["stride"]) for text in texts}) < 2
    return "" if alike else " (unequal texts or windows)"


def _metrics(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each task's metrics, without their errors."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for task, metrics in run.results.get("tasks", {}).items():
            for metric in metrics:
                if metric not in COUNTED and "_stderr" not in metric:
                    found[task, metric] = None
    return list(found)


def _keys(runs: Sequence[Run], section: str) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.results.get(section, {})))


def _shown(values: Sequence[float | None], form: str) -> list[str]:
    return ["-" if value is None else form.format(value) for value in values]


def markdown(runs: Sequence[Run], found: Sequence[Row]) -> str:
    """The page."""
    lines = ["# Comparison", "", "| | " + " | ".join(run.name for run in runs) + " |"]
    lines += ["|---|" + "---:|" * len(runs)]
    lines += [
        f"| {what} | " + " | ".join(f"`{v}`" if what == "layers" else v for v in values) + " |"
        for what, values in found
    ]
    return "\n".join([*lines, "", "![Comparison](comparison.png)", ""])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, or results of evaluations")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.md, .json and .png there")


def main(args: argparse.Namespace) -> None:
    """Print the table, and write it with the picture."""
    runs = [Run.read(path, name) for path, name in zip(args.runs, names(args.runs), strict=True)]
    out: Path | None = args.out
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError("--out is no directory", got=out)
    found = rows(runs)
    _print(runs, found)
    if out is None:
        return
    from megatron_ext.evaluation.compare_plot import plot_comparison

    content = {run.name: {"architecture": run.architecture.to_dict(), **run.results} for run in runs}
    for name, text in (
        ("comparison.md", markdown(runs, found)),
        ("comparison.json", json.dumps(content, indent=2, allow_nan=False) + "\n"),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    plot_comparison(runs, out / "comparison.png")
    print(f"wrote {out / 'comparison.md'} and {out / 'comparison.png'}")


def _print(runs: Sequence[Run], found: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for what, values in found:
        table.add_row(what, *values)
    Console(width=max(100, Console().width)).print(table, markup=False, highlight=False)
