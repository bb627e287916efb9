"""What the pruning job asks of a family of models, such as `language_models.LANGUAGE_MODELS`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.pruning.saved_plan import SavedPlan
from megatron_ext.pruning.scores import Scores
from megatron_ext.training.job import RunConfig


@dataclass(frozen=True)
class Measured:
    """What calibration found.

    Attributes:
        values: The scores by name, on rank 0; None elsewhere.
        loss: The model's mean loss on the samples; None if it was not run.
        task: Its score at the task, if there is one.
    """

    values: dict[str, Tensor] | None
    loss: float | None
    task: float | None = None


@dataclass(frozen=True)
class Round:
    """One of `--prune-iterations` rounds.

    Attributes:
        model: What is scored.
        targets: What it is to become, as the options say it.
        plan: What made it of the original, if anything did.
    """

    model: Any
    targets: Any
    plan: SavedPlan | None = None


@dataclass(frozen=True)
class Loss:
    """A model on the way from the original to the pruned one, and its loss on the calibration data.

    Attributes:
        name: `original`, `round 1`, ..., `pruned`.
        parameters: In all.
        nats: Mean over tokens, or images.
    """

    name: str
    parameters: int
    nats: float


class PrunedFamily(ABC):
    """From a model to scores, to a plan, and to words about it.

    Attributes:
        plan: Its plans.
        scores: Its scores.
        split: Which part of the data its models are calibrated on.
        per: What a loss is the mean over.
    """

    plan: type[SavedPlan]
    scores: type[Scores]
    split: Literal["train", "valid"] = "train"
    per = "token"

    @abstractmethod
    def make_plan(self, run: RunConfig, round: Round, scores: Scores, path: str) -> SavedPlan:
        """The plan that keeps the most important positions of every axis.

        Args:
            run: The command line.
            round: The model, and what it is to become.
            scores: Its scores.
            path: Where they are, for the provenance.
        """

    @abstractmethod
    def calibrate(self, run: RunConfig, chunks: list[Any], round: Round, request: Any) -> Measured:
        """Score a model by data. A collective of all ranks."""

    @abstractmethod
    def magnitudes(self, reader: CheckpointReader, model: Any) -> dict[str, Tensor]:
        """Width scores from a checkpoint's weights alone. A collective of all processes."""

    @abstractmethod
    def settings(self, run: RunConfig, round: Round) -> dict[str, Any]:
        """What calibrated scores depend on beside the weights and `--prune-width-metric`."""

    @abstractmethod
    def data(self, run: RunConfig) -> list[str]:
        """The calibration data, in words."""

    def recover(self, run: RunConfig, plan: Any) -> Any:
        """The plan with what stands in place of dropped layers, if the options ask for that. A collective."""
        return plan

    @abstractmethod
    def check_layout(self, run: RunConfig, model: Any) -> None:
        """Check that a model fits the layout of a run.

        Raises:
            ConfigError: It does not.
        """

    @abstractmethod
    def page(
        self, run: RunConfig, plan: Any, scores: Sequence[Scores], losses: Sequence[Loss], remark: str = ""
    ) -> str:
        """`report.md`."""

    def html(self, run: RunConfig, plan: Any, scores: Sequence[Scores], losses: Sequence[Loss]) -> str | None:
        """`report.html`; None of a family whose plans have no such page."""
        return None

    @abstractmethod
    def plot(self, scores: Scores, plan: Any, path: Path) -> None:
        """`importance.png`: the scores of every axis, kept and dropped."""
