"""The scores of a pruning job on disk: what they were measured by, and where they wait while the job is not done."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from megatron_ext.checkpoint import layout, ranks
from megatron_ext.pruning.pruned_family import Measured, PrunedFamily, Round
from megatron_ext.pruning.scores import Scores
from megatron_ext.training.job import RunConfig


@dataclass(frozen=True)
class SavedScores:
    """A file beside `--save` that holds scores until the run directory is there.

    Attributes:
        path: `.NAME.scores-HASH.safetensors`; the hash is of the weights and of all that was asked for.
        settings: What was asked for.
        kind: Of the scores.
    """

    path: Path
    settings: dict[str, Any]
    kind: type[Scores] = Scores

    @classmethod
    def of(cls, run: RunConfig, family: PrunedFamily, round: Round, source: layout.Step) -> Self:
        """Where the scores of one round belong; the arguments are those of `described`."""
        settings = _settings(run, family, round)
        identity = json.dumps([layout.fingerprint(source.path), settings], sort_keys=True, default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        save = Path(run.args.save)
        return cls(save.parent / f".{save.name}.scores-{digest}.safetensors", settings, family.scores)

    def found(self) -> Scores | None:
        """What an earlier start measured, on rank 0.

        Raises:
            PlanError: The file is damaged.
        """
        if ranks.rank() or not self.path.is_file():
            return None
        print(f"scores of an earlier start: {self.path}", flush=True)
        return self.kind.load(self.path)

    def save(self, scores: Scores) -> None:
        """Write them, and say where they are."""
        scores.save(self.path)
        print(f"scored; the same command goes on from {self.path}, where the scores wait for the rest", flush=True)


def described(
    run: RunConfig,
    family: PrunedFamily,
    round: Round,
    source: layout.Step,
    values: dict[str, torch.Tensor],
    measured: Measured,
) -> Scores:
    """Scores with all that is known of them.

    Args:
        run: The command line.
        family: What the model belongs to.
        round: The model that was scored, and for what.
        source: The step that is cut.
        values: The scores.
        measured: What calibration found beside them.
    """
    args, options = run.args, run.options["prune"]
    return family.scores(
        values=values, architecture=round.model, model=str(args.load), iteration=source.iteration,
        fingerprint=layout.fingerprint(source.path), data=" ".join(family.data(run)), seed=args.seed,
        samples=options.samples if options.calibrates else 0, metric=options.metric(), loss=measured.loss,
        task=measured.task, settings=_settings(run, family, round),
    )  # fmt: skip


def _settings(run: RunConfig, family: PrunedFamily, round: Round) -> dict[str, Any]:
    """All that scores depend on beside the weights, and nothing that they do not, such as the layout."""
    options = run.options["prune"]
    plan = "" if round.plan is None else round.plan.fingerprint
    settings: dict[str, Any] = {"width_metric": options.width_metric, "plan": plan}
    if options.width_metric == "activation":
        settings |= {
            "batch_aggregation": options.batch_aggregation,
            "sequence_aggregation": options.sequence_aggregation,
        }
    if options.calibrates:
        settings |= family.settings(run, round)
    return settings
