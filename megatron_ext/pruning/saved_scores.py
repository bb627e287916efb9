"""The scores of a pruning job on disk: what they were measured by, and where they wait while the job is not done."""

import hashlib
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from megatron_ext.checkpoint import layout, ranks
from megatron_ext.models.architecture import Architecture
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, Scan, Shapley
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.training.job import RunConfig

if TYPE_CHECKING:
    from megatron_ext.pruning.calibration import Measured


@dataclass(frozen=True)
class SavedScores:
    """A file beside `--save` that holds scores until the run directory is there.

    Attributes:
        path: `.NAME.scores-HASH.safetensors`; the hash is of the weights and of all that was asked for.
        settings: What was asked for.
    """

    path: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, run: RunConfig, arch: Architecture, targets: Targets, source: layout.Step, plan: Plan | None) -> Self:
        """Where the scores of one round belong; the arguments are those of `described`."""
        settings = _settings(run, arch, targets, plan)
        identity = json.dumps([layout.fingerprint(source.path), settings], sort_keys=True, default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        save = Path(run.args.save)
        return cls(save.parent / f".{save.name}.scores-{digest}.safetensors", settings)

    def found(self) -> Scores | None:
        """What an earlier start measured, on rank 0.

        Raises:
            PlanError: The file is damaged.
        """
        if ranks.rank() or not self.path.is_file():
            return None
        print(f"scores of an earlier start: {self.path}", flush=True)
        return Scores.load(self.path)

    def save(self, scores: Scores) -> None:
        """Write them, and say where they are."""
        scores.save(self.path)
        print(f"scored; the same command goes on from {self.path}, where the scores wait for the rest", flush=True)


def described(
    run: RunConfig,
    arch: Architecture,
    targets: Targets,
    source: layout.Step,
    plan: Plan | None,
    values: dict[str, torch.Tensor],
    measured: "Measured",
) -> Scores:
    """Scores with all that is known of them.

    Args:
        run: The command line.
        arch: The model that was scored.
        targets: What they are to choose for.
        source: The step that is cut.
        plan: What made `arch` of the original, if anything did.
        values: The scores.
        measured: What calibration found beside them.
    """
    args, options = run.args, run.options["prune"]
    return Scores(
        values=values, architecture=arch, model=str(args.load), iteration=source.iteration,
        fingerprint=layout.fingerprint(source.path), data=" ".join(_data(args)), seed=args.seed,
        samples=options.samples if options.calibrates else 0, metric=options.metric(), loss=measured.loss,
        task=measured.task, settings=_settings(run, arch, targets, plan),
    )  # fmt: skip


def _settings(run: RunConfig, arch: Architecture, targets: Targets, plan: Plan | None) -> dict[str, Any]:
    """All that scores depend on beside the weights, and nothing that they do not, such as the layout."""
    args, options = run.args, run.options["prune"]
    settings: dict[str, Any] = {"width_metric": options.width_metric, "plan": "" if plan is None else plan.fingerprint}
    if options.width_metric == "activation":
        settings |= {
            "batch_aggregation": options.batch_aggregation,
            "sequence_aggregation": options.sequence_aggregation,
        }
    if not options.calibrates:
        return settings
    calibration = options.calibration(arch, targets, args.seed, args.global_batch_size)
    settings |= {
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


def _data(args: Namespace) -> list[str]:
    return [str(word) for word in args.data_path or args.train_data_path or ["mock"]]


def _size(word: str) -> str:
    """A data prefix with the bytes it has, which tell whether it is still the same."""
    file = Path(f"{word}.bin")
    return f"{word} {file.stat().st_size}" if file.is_file() else word
