"""What is found out about a compression before its first command runs: everything that would end a later one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.checkpoint.gguf import source as gguf
from megatron_ext.checkpoint.huggingface import families, hf_assets
from megatron_ext.compression.stages import split_flags
from megatron_ext.conversion import hub
from megatron_ext.distillation.options import DistillOptions
from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.training_cost import GPUS, Layout, TeacherSetup, memory, step_seconds
from megatron_ext.pruning.budget import resolve
from megatron_ext.pruning.options import PruneOptions
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import Job

JOB = Job("compress", options={"prune": PruneOptions, "distill": DistillOptions})
"""What the flags are checked by; not `STOPPABLE`, because Megatron would take this process's signals."""
PLACES = (
    "--load", "--save", "--pretrained-checkpoint", "--train-iters", "--data-path", "--tokenizer-model", "--preset",
    "--distill-teacher", "--prune-plan", "--prune-scores",
)  # fmt: skip
"""Flags of the jobs that the stages set themselves."""


@dataclass(frozen=True)
class Preflight:
    """What a compression is about.

    Attributes:
        original: The model.
        target: What it becomes, as far as that is known before it is scored.
        layout: Of distillation.
    """

    original: Architecture
    target: Architecture
    layout: Layout

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of distillation on the fullest GPU, by component."""
        return memory(self.target, self.layout, TeacherSetup(self.original))

    def seconds(self, gpu: str, efficiency: float = 0.45) -> float:
        """Of a step of distillation, on GPUs of this name at this share of their peak."""
        return sum(step_seconds(self.target, self.layout, GPUS[gpu], efficiency, self.original).values())


def architecture(model: Path) -> Architecture:
    """The model of a Hugging Face directory, or of one on the hub, which has a tokenizer; or of a GGUF file.

    Raises:
        CheckpointError, ConfigError: It is none, or none that is converted; or its tokenizer is missing.
    """
    model = hub.directory(model)
    if gguf.is_gguf(model):
        with gguf.opened(model) as described:
            return families.of_config(described.config).read(described.config)
    hf_assets.check(model)
    config = hf_assets.read_config(model)
    found = families.of_config(config).read(config)
    hf_assets.check_tokenizer(model)
    return found


def preflight(
    original: Architecture, to: float | None, flags: Sequence[str], words: Sequence[str], ranks: int
) -> Preflight:
    """Check what would end a later command, and find what the model becomes.

    Args:
        original: The model.
        to: Parameters to keep.
        flags: Those that are handed on.
        words: Megatron's flags of the training.
        ranks: How many there are.

    Raises:
        ConfigError, PlanError: A flag is wrong, the layout divides no model, or nothing is as small as asked.
    """
    for word in flags:
        if (name := word.partition("=")[0]) in PLACES:
            raise ConfigError("a compression says this itself", got=name, legal="without it; or edit its recipe.yaml")
    each = split_flags(flags)
    if to is not None and any(word.startswith("--prune-target") for word in each["prune"]):
        raise ConfigError("two budgets given", got="--to and --prune-target-*", legal="one of them")
    with _as_one_of(ranks):
        run = parse_command_line(
            JOB, ["--dry-run", *original.to_flags(), *words, *each["all"], *each["prune"], *each["distill"]]
        )
    options: PruneOptions = run.options["prune"]
    targets = options.targets() if to is None else replace(options.targets(), params=to)
    targets.check(original)
    kinds = targets.kinds(original)
    blocks = targets.num_layers is not None or targets.num_sublayers is not None or kinds
    # Which layers go is not known yet: the widths of all of them bound memory and time from above.
    target = original if blocks and to is None else resolve(original, targets, original.pattern)
    target.validate(tp=run.args.tensor_model_parallel_size, pp=run.args.pipeline_model_parallel_size)
    return Preflight(original, target, Layout.from_args(run.args))


@contextmanager
def _as_one_of(ranks: int) -> Iterator[None]:
    """Validate a command line as one of so many ranks; what it says of them in the environment is gone afterwards."""
    before = dict(os.environ)
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
