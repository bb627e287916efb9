"""`megatron-ext compare`: several checkpoints side by side, from their `results.json` and what the checkpoints say."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.checkpoint.outputs import check_writable
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.compare_rows import Row, rows
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.metrics_file import finite

PAGE, NUMBERS, PICTURE = "comparison.md", "comparison.json", "comparison.png"
TITLE = "# Comparison\n"


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(own[-length:]) for own in parts]
        if len(set(short)) == len(short):
            return short
    raise ConfigError("a run is given twice", got=", ".join(map(str, paths)))


def markdown(runs: Sequence[Run], found: Sequence[Row]) -> str:
    """The page."""
    lines = [TITLE, "| | " + " | ".join(run.name for run in runs) + " |"]
    lines += ["|---|" + "---:|" * len(runs)]
    lines += [
        f"| {_cell(row.label)} | " + " | ".join(f"`{v}`" if row.what == "layers" else v for v in row.values) + " |"
        for row in found
    ]
    return "\n".join([*lines, "", f"![Comparison]({PICTURE})", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def as_json(runs: Sequence[Run], found: Sequence[Row]) -> dict[str, Any]:
    """By run its architecture, its results, and under `unequal` by row what of it was measured unlike the others."""
    content: dict[str, Any] = {}
    for number, run in enumerate(runs):
        unequal = {
            row.what: {name: values[number] for name, values in row.unequal.items()} for row in found if row.unequal
        }
        described = run.model.to_dict() if isinstance(run.model, Architecture) else dict(run.model)
        content[run.name] = {"architecture": described, **run.results, "unequal": unequal}
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, or results of evaluations")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.md, .json and .png there")


def main(args: argparse.Namespace) -> None:
    """Print the table, and write it with the picture."""
    runs = [Run.read(path, name) for path, name in zip(args.runs, names(args.runs), strict=True)]
    out: Path | None = args.out
    if out is not None:
        check_writable(out, "--out")
        _refuse_foreign(out)
    found = rows(runs)
    _print(runs, found)
    if out is None:
        return
    from megatron_ext.evaluation.compare_plot import plot_comparison

    for name, text in (
        (NUMBERS, json.dumps(finite(as_json(runs, found)), indent=2, allow_nan=False) + "\n"),  # by which it is known
        (PAGE, markdown(runs, found)),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    plot_comparison(runs, out / PICTURE)
    print(f"wrote {out / PAGE} and {out / PICTURE}")


def _refuse_foreign(out: Path) -> None:
    """Refuse to overwrite anything but an earlier comparison.

    Raises:
        ConfigError: A file of that name is there, and not `compare`'s.
    """
    there = [out / name for name in (PAGE, NUMBERS, PICTURE) if (out / name).exists()]
    if there and not _is_comparison(out):
        raise ConfigError(
            "--out: a file of that name is there and is no comparison of ours", got=there[0], legal="another directory"
        )


def _is_comparison(out: Path) -> bool:
    """Whether the page and the numbers in a directory, if they are there, are what `compare` writes."""
    try:
        numbers = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
        page = (out / PAGE).read_text(encoding="utf-8") if (out / PAGE).exists() else TITLE
    except (OSError, ValueError):
        return False
    runs = list(numbers.values()) if isinstance(numbers, dict) else []
    ours = [isinstance(run, dict) and {"architecture", "unequal"} <= run.keys() for run in runs]
    return bool(ours) and all(ours) and page.startswith(TITLE)


def _print(runs: Sequence[Run], found: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for row in found:
        table.add_row(row.label, *row.values)
    Console(width=max(100, Console().width)).print(table, markup=False, highlight=False)
