"""Pruning of language models: layer patterns of Transformer, Mamba-2 and hybrid models."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.models.architecture import Architecture
from megatron_ext.pruning import plan_page, report
from megatron_ext.pruning.checks import Request, check_layout
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, Scan, Shapley
from megatron_ext.pruning.magnitude import magnitudes
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.pruned_family import Loss, Measured, PrunedFamily, Round
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import make_plan
from megatron_ext.training.job import RunConfig


class LanguageModels(PrunedFamily):
    """Layer patterns; a model is an `Architecture`."""

    plan, scores = Plan, Scores

    def make_plan(self, run: RunConfig, round: Round, scores: Scores, path: str) -> Plan:
        """See `select.make_plan`."""
        merge = run.options["prune"].merge_heads
        return make_plan(scores, round.model, round.targets, scores_path=path, merge_heads=merge)

    def calibrate(self, run: RunConfig, chunks: list[Any], round: Round, request: Request) -> Measured:
        """See `calibration.calibrate`."""
        from megatron_ext.pruning.calibration import calibrate

        options, args = run.options["prune"], run.args
        asked = options.calibration(run.architecture, round.targets, args.seed, args.global_batch_size)
        return calibrate(run, chunks, asked, request.task.judge if request.task is not None else None)

    def recover(self, run: RunConfig, plan: Plan) -> Plan:
        """See `fitting.recover`."""
        if run.options["prune"].recover is None:
            return plan
        from megatron_ext.pruning.fitting import recover

        found = recover(run, plan)
        if run.args.rank == 0:
            print("\n".join(report.recovery_lines(found)), flush=True)
        return found

    def magnitudes(self, reader: CheckpointReader, model: Architecture) -> dict[str, Tensor]:
        """See `magnitude`."""
        return magnitudes(reader, model)

    def settings(self, run: RunConfig, round: Round) -> dict[str, Any]:
        """What calibration sees, and how depth is measured."""
        args, options = run.args, run.options["prune"]
        calibration = options.calibration(round.model, round.targets, args.seed, args.global_batch_size)
        settings: dict[str, Any] = {
            "samples": options.samples, "sequence": args.seq_length, "seed": args.seed, "split": args.split,
            "data": [_size(word) for word in _data(args)], "type": str(args.params_dtype),
            "depth_metric": calibration.depth, "blocks": calibration.blocks,
        }  # fmt: skip
        if calibration.kinds:
            settings["kinds"] = calibration.kinds
        depth = DEPTH_METRICS[calibration.depth]
        if isinstance(depth, Scan):
            settings["run"] = calibration.run
        by_task = isinstance(depth, Scan) and depth.worse is None
        if by_task:
            names = ("task", "task_metric", "task_samples", "task_folder")
        elif isinstance(depth, Shapley):
            names = ("shapley_samples", "shapley_tolerance", "shapley_keep")
        else:
            names = ()
        if not isinstance(depth, Change) and not by_task:
            settings["depth_samples"] = calibration.depth_samples
        return settings | {name: getattr(options, name) for name in names}

    def data(self, run: RunConfig) -> list[str]:
        """The words of `--data-path`."""
        return _data(run.args)

    def check_layout(self, run: RunConfig, model: Architecture) -> None:
        """Of whole blocks on each pipeline stage, too."""
        check_layout(run, model)

    def page(
        self, run: RunConfig, plan: Plan, scores: Sequence[Scores], losses: Sequence[Loss], remark: str = ""
    ) -> str:
        """With what serving needs."""
        return report.markdown(plan, run.options["prune"].served, scores, losses, remark)

    def html(self, run: RunConfig, plan: Plan, scores: Sequence[Scores], losses: Sequence[Loss]) -> str:
        """See `plan_page`."""
        first = scores[0] if scores else None
        name, served = Path(plan.provenance.model or run.args.load).name, run.options["prune"].served
        return plan_page.page([plan_page.View(f"{name}, pruned", plan, first, losses, served)])

    def plot(self, scores: Scores, plan: Plan, path: Path) -> None:
        """One panel for each axis."""
        report.plot_scores(scores, plan, path)


def _data(args: Namespace) -> list[str]:
    return [str(word) for word in args.data_path or args.train_data_path or ["mock"]]


def _size(word: str) -> str:
    """A data prefix with the bytes it has, which tell whether it is still the same."""
    file = Path(f"{word}.bin")
    return f"{word} {file.stat().st_size}" if file.is_file() else word


LANGUAGE_MODELS = LanguageModels()
