"""`megatron-ext report`: draw a run directory's report again from its numbers."""

import argparse
import json
from pathlib import Path

from megatron_ext.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a demo's directory, or the --save of a training job")


def main(args: argparse.Namespace) -> None:
    """Draw a run directory's report again from its numbers: `report.json` of a demo, else `metrics.jsonl`."""
    run: Path = args.run
    if not run.is_dir():
        raise DataError("no such run directory", got=run, legal="the --out of a demo or the --save of a training job")
    numbers, metrics = run / "report.json", run / "metrics.jsonl"
    if not numbers.is_file() and not metrics.is_file():
        raise DataError("nothing to report on", got=run, legal="a directory with report.json or metrics.jsonl")
    from megatron_ext.demo import real_report
    from megatron_ext.demo.report import write_report
    from megatron_ext.reports.training_plot import plot_training

    if numbers.is_file():
        try:
            measured = json.loads(numbers.read_text())
        except ValueError as error:
            raise DataError(f"the report's numbers are not JSON: {error}", got=numbers) from error
        if not isinstance(measured, dict):
            raise DataError("the report's numbers are not an object", got=numbers)
        if "models" in measured:
            real_report.write_report(run, measured)
        else:
            write_report(run, measured)
        print(f"wrote {run / 'report.md'} and {run / 'report.png'}")
    if metrics.is_file():
        plot_training(metrics, run / "metrics.png")
        print(f"wrote {run / 'metrics.png'}")
