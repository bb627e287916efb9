"""`megatron-ext report`: draw a run directory's report again from its numbers, or several plans side by side."""

import argparse
import json
from pathlib import Path

from megatron_ext.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    runs = "a demo's directory, or the --save of a training or pruning job; several of pruning jobs with --out"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help=runs)
    parser.add_argument("--out", type=Path, metavar="FILE", help="an HTML page of the plans of pruning jobs")


def main(args: argparse.Namespace) -> None:
    """Draw `report.json` of a demo, `metrics.jsonl` of a training, or `plan.json` of pruning jobs.

    Raises:
        ConfigError: Flags do not go together.
        DataError, PlanError: There is nothing to report on, or it is damaged.
    """
    for run in args.runs:
        if not run.is_dir():
            raise DataError("no such run directory", got=run, legal="the --out of a demo or the --save of a job")
    plans = [(run / "plan.json").is_file() for run in args.runs]
    if len(args.runs) > 1 or args.out is not None:
        if not all(plans):
            raise ConfigError("several reports, or --out, are of plans", got=args.runs[plans.index(False)],
                              legal="directories of pruning jobs")  # fmt: skip
        if args.out is None:
            raise ConfigError("several plans on one page", got=f"{len(args.runs)} directories", legal="--out FILE.html")
    if all(plans):
        _draw_plans(args.runs, args.out or args.runs[0] / "report.html")
        return
    _draw_run(args.runs[0])


def _draw_plans(runs: list[Path], out: Path) -> None:
    from megatron_ext.checkpoint.atomic import write_text
    from megatron_ext.checkpoint.outputs import check_writable
    from megatron_ext.pruning.plan_page import of_directory, page

    check_writable(out.parent, "--out")
    write_text(out, page([of_directory(run) for run in runs]))
    print(f"wrote {out}")


def _draw_run(run: Path) -> None:
    numbers, metrics = run / "report.json", run / "metrics.jsonl"
    if not numbers.is_file() and not metrics.is_file():
        legal = "a directory with report.json, metrics.jsonl or plan.json"
        raise DataError("nothing to report on", got=run, legal=legal)
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
