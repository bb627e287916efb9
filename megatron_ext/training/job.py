"""What a command does, as a value: its options, its checks before any process group, its dry run, its run."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.start import Start
from megatron_ext.families.family import Model, ModelFamily
from megatron_ext.families.language_model import LANGUAGE_MODEL
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import Pattern
from megatron_ext.models.pattern import parse as parse_pattern

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ext.training.step import Task

STOPPABLE = ("--exit-signal-handler",)
"""Of a job that trains: SIGTERM and Ctrl-C let it finish its step, save, and end well."""

FORWARD_ONLY = (
    "--skip-train", "--train-iters", "1", "--lr", "0", "--eval-iters", "0", "--no-load-optim", "--no-load-rng",
    "--finetune",
)  # fmt: skip
"""Of a job that loads a model and trains nothing: what Megatron insists on, and what it need not load."""


@dataclass(frozen=True)
class DryRun:
    """What a job adds to the screen that `--dry-run` prints.

    Attributes:
        rows: Lines of the table, by their names.
        tables: Printed below it.
        memory: Bytes on the fullest rank by component; by default what the model alone takes to train.
    """

    rows: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence["Table"] = ()
    memory: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Job:
    """One kind of run.

    Attributes:
        name: `pretrain`, `prune`, `distill`: written into the run directory, which belongs to one kind.
        family: The models that it works on.
        options: Our option dataclasses by flag prefix.
        defaults: Megatron flags that this job sets unless the user does.
        offline: Whether the job reads no data by these arguments of ours, and so needs no tokenizer.
        makes_new: Whether `--save` is a directory that the job makes, and not one that it works in.
        measures: Which split it reads with `--skip-train`: 0 training, 1 validation.
        task: What the model is trained and measured on; by default the next token of a text.
        check: Finds what is wrong with the options before any process group; what it returns is given to the others.
        dry_run: What `--dry-run` prints beside model, memory and layout.
        run: Does the work; by default trains `task`, or measures it with `--skip-train`.
    """

    name: str
    family: ModelFamily = LANGUAGE_MODEL
    options: dict[str, type] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()
    offline: Callable[[Namespace], bool] = lambda early: False
    makes_new: bool = False
    measures: int = 0
    task: Callable[["RunConfig"], "Task"] | None = None
    check: Callable[["RunConfig"], Any] = lambda run: None
    dry_run: Callable[["RunConfig", Any], DryRun] = lambda run, checked: DryRun()
    run: Callable[["RunConfig", Any], None] | None = None


@dataclass(frozen=True)
class RunConfig:
    """A validated command line.

    Attributes:
        job: The kind of run.
        args: Megatron's namespace, our flags among them.
        model: Of the job's family.
        dry_run: Whether to print and stop.
        options: Our options by prefix, as instances of the job's dataclasses.
        model_source: Where the architecture came from, for people.
        start: The step that is loaded; None for random weights.
    """

    job: Job
    args: Namespace
    model: Model
    dry_run: bool
    options: dict[str, Any]
    model_source: str
    start: Start | None = None

    @property
    def resumed(self) -> int:
        """The step that the run goes on from, 0 for one that begins."""
        continues = self.start is not None and self.start.continues and not self.args.finetune
        return self.start.step.iteration if continues and self.start is not None else 0

    @property
    def architecture(self) -> Architecture:
        """The model of a job that works on language models."""
        assert isinstance(self.model, Architecture)
        return self.model

    @property
    def vocab_size(self) -> int:
        """Entries of the run's tokenizer; the model's embedding has `padded_vocab_size` rows."""
        return self.args.vocab_size

    @property
    def pattern(self) -> Pattern:
        """The layer pattern with this run's pipeline borders."""
        return parse_pattern(self.args.hybrid_layer_pattern)


def task_of(run: RunConfig) -> "Task":
    """What the job's model is trained and measured on."""
    from megatron_ext.training.step import language_modelling

    return language_modelling(run.args) if run.job.task is None else run.job.task(run)
