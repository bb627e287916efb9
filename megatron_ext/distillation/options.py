"""The flags of `distill_gpt.py`, and what they ask for at each moment of the training."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.distillation import intermediate_layers
from megatron_ext.distillation.intermediate_layers import DISTANCES, LayerPair
from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.teachers.exchange import ParallelSizes
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.lm_head import divergences
from megatron_ext.lm_head.objective import Objective
from megatron_ext.options.fields import option
from megatron_ext.training.job import RunConfig

BALANCED = "balanced"
DEFAULT_K = 100


@dataclass(frozen=True)
class LogitOptions:
    """From whose logits the student learns, and how the losses are weighted: of every family of models."""

    teacher: str | None = option(None, "Checkpoint of the teacher: a directory of steps, or one step.")
    temperature: float | None = option(
        None, "Temperature of both distributions; the loss is multiplied by its square. Default: 1, or the cache's."
    )
    loss: str | None = option(
        None, "How student and teacher are compared. Default: forward-kl; with a cache top-k-rest.", divergences.names
    )
    kd_weight: str = option("1.0", "Weight of that loss: a number, or FIRST:LAST to go in a line over the training.")
    ce_weight: str = option("0.0", "Weight of the cross-entropy with the data's label: likewise.")
    jsd_beta: float = option(0.5, "Of jsd: the teacher's share of the mixture.")
    top_k: int | None = option(
        None,
        "Of top-k and top-k-rest: how many of the teacher's entries count one by one; of a cache: how many are stored. "
        f"Default: {DEFAULT_K}, or all that the cache holds.",
    )

    def weighted(self, objective: Objective, share: float) -> Objective:
        """An objective with the weights of when this share of the training is done.

        Raises:
            ConfigError: A weight is no number and no FIRST:LAST.
        """
        kd_weight, ce_weight = (_weight(name, getattr(self, name), share) for name in ("kd_weight", "ce_weight"))
        return replace(objective, kd_weight=kd_weight, ce_weight=ce_weight)

    def compared(self, default: Objective) -> Objective:
        """What is asked for, weights aside.

        Args:
            default: What is compared where nothing is asked for.
        """
        return Objective(
            default.divergence if self.loss is None else self.loss,
            default.temperature if self.temperature is None else self.temperature,
            beta=self.jsd_beta,
            k=default.k if self.top_k is None else self.top_k,
        )


@dataclass(frozen=True)
class DistillOptions(LogitOptions):
    """Whom the student learns from, and how the losses are weighted."""

    cache: str | None = option(None, "Directory of a cache, in place of the teacher.")
    cache_write: str | None = option(
        None, "Train nothing; store the teacher's likeliest next tokens of one pass over the data in this directory."
    )
    cache_dtype: Literal["float16", "float32"] = option("float16", "In which their probabilities are stored.")
    states: list[str] | None = option(
        None, "Pairs STUDENT:TEACHER of intermediate states to match, or kinds of sub-layers (see docs/distill.md)."
    )
    states_loss: str = option("cosine", "How states are compared.", DISTANCES.keys)
    states_weight: str = option(
        BALANCED,
        f"Weight of that loss: {BALANCED}, which makes it as large as the logits' loss, or as the other weights.",
    )
    teacher_tensor_model_parallel_size: int | None = option(
        None, "Tensor-parallel size of the teacher, if it is to have another layout than the student."
    )
    teacher_pipeline_model_parallel_size: int | None = option(None, "Pipeline-parallel size of the teacher: likewise.")
    teacher_ranks: int | None = option(
        None, "How many ranks, the last ones, run the teacher and nothing else. Default: it runs on the student's."
    )
    correct_teacher: Literal["first", "together", "only"] | None = option(
        None,
        "Fine-tune the teacher on the data, with a fifth of the learning rate and 120 steps of warm-up: "
        "before the student is trained, while it is, or without a student.",
    )
    correction_iters: int | None = option(
        None, "Steps of a correction before the student is trained. Default: as many as the student's."
    )


def source_of(options: DistillOptions) -> Teacher | Cache:
    """Whom the student learns from.

    Raises:
        ConfigError: Nobody, or two; or a cache is asked for what it does not know.
        CheckpointError: There is no usable checkpoint of the teacher.
        DataError: There is no usable cache.
    """
    if options.cache is not None and options.teacher is not None:
        raise ConfigError("--distill-teacher and --distill-cache are one too many", legal="one of them")
    if options.cache is None:
        if options.teacher is None:
            legal = "the checkpoint directory of the teacher, or --distill-cache"
            raise ConfigError("--distill-teacher is missing", legal=legal)
        return Teacher.find(options.teacher)
    wanting = (
        "states",
        "correct_teacher",
        "teacher_tensor_model_parallel_size",
        "teacher_pipeline_model_parallel_size",
        "teacher_ranks",
    )
    if given := [f"--distill-{name.replace('_', '-')}" for name in wanting if getattr(options, name)]:
        raise ConfigError("a cache has no teacher to run", got=", ".join(given), legal="--distill-teacher")
    return Cache.find(options.cache)


def compared(options: DistillOptions, source: Teacher | Cache) -> Objective:
    """What the options ask for, weights aside, with defaults that a cache decides."""
    default = Objective(k=DEFAULT_K)
    if isinstance(source, Cache):
        default = Objective("top-k-rest", source.manifest.temperature, k=source.manifest.k)
    return options.compared(default)


def check_objective(objective: Objective, entries: int) -> None:
    """Find what is wrong with what is compared, and with its weights.

    Args:
        objective: With its weights.
        entries: Entries of the logits, without padding.

    Raises:
        ConfigError: One is illegal.
    """
    objective.check(entries)
    if min(objective.kd_weight, objective.ce_weight) < 0 or not objective.kd_weight + objective.ce_weight > 0:
        raise ConfigError(
            "--distill-kd-weight and --distill-ce-weight must not be negative, nor both zero",
            got=f"{objective.kd_weight} and {objective.ce_weight}",
        )


def check_weights(options: DistillOptions, source: Teacher | Cache, vocab_size: int) -> None:
    """Find what is wrong with the losses and their weights, at the first and the last step.

    Args:
        options: The flags.
        source: Whom the student learns from.
        vocab_size: Entries of the tokenizer, without padding.

    Raises:
        ConfigError: One is illegal.
    """
    for share in (0.0, 1.0):
        objective, weight = objective_at(options, source, share), states_weight_at(options, share)
        check_objective(objective, vocab_size)
        if (weight or 0) < 0:
            raise ConfigError("--distill-states-weight must not be negative", got=options.states_weight)
        if options.states and weight is None and not objective.kd_weight:
            raise ConfigError(
                f"--distill-states-weight {BALANCED} balances the states' loss with the logits', which has no weight",
                got=f"--distill-kd-weight {options.kd_weight}", legal="a number, or a positive --distill-kd-weight",
            )  # fmt: skip
    if options.states_loss not in DISTANCES:
        raise ConfigError("unknown --distill-states-loss", got=options.states_loss, legal=", ".join(DISTANCES))


def pairs(run: RunConfig, options: DistillOptions, teacher: Teacher) -> tuple[LayerPair, ...]:
    """The pairs of states that are to be matched.

    Raises:
        ConfigError: A pair is illegal, or the states will not be there.
    """
    if not options.states:
        return ()
    if run.args.recompute_granularity == "full":
        raise ConfigError(
            "--distill-states needs states that full recomputation does not keep",
            got="--recompute-granularity full", legal="--recompute-granularity selective, or none",
        )  # fmt: skip
    return intermediate_layers.parse(options.states, run.pattern, teacher.architecture.layers)


def teacher_sizes(run: RunConfig, options: DistillOptions) -> ParallelSizes | None:
    """The teacher's layout if it is not the student's.

    Raises:
        ConfigError: It does not divide the ranks, or something else asks for the student's.
    """
    args = run.args
    student = ParallelSizes(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    grid = ParallelSizes(
        options.teacher_tensor_model_parallel_size or student.tp,
        options.teacher_pipeline_model_parallel_size or student.pp,
    )
    if grid == student and options.teacher_ranks is None:
        return None
    ranks = options.teacher_ranks or args.world_size
    if min(grid) < 1 or ranks % (grid.tp * grid.pp):
        raise ConfigError(
            "the teacher's layout does not divide the ranks",
            got=f"{grid.tp} x {grid.pp}",
            legal=f"a divisor of {ranks}",
        )
    if options.correct_teacher == "first" and options.teacher_ranks is not None:
        raise ConfigError(
            "a teacher on ranks of its own cannot be corrected first", got=f"--distill-teacher-ranks {ranks}",
            legal="--distill-correct-teacher only, in a run before",
        )  # fmt: skip
    if options.correct_teacher == "together":
        raise ConfigError(
            "a teacher that is corrected together with its student has its layout", got=f"{grid.tp} x {grid.pp}",
            legal="--distill-correct-teacher first",
        )  # fmt: skip
    for flag in ("reset_position_ids", "reset_attention_mask"):
        if getattr(args, flag):
            raise ConfigError(f"a teacher on another layout does not go with --{flag.replace('_', '-')}")
    return grid


def objective_at(options: DistillOptions, source: Teacher | Cache, share: float) -> Objective:
    """What the options ask for when this share of the training is done.

    Raises:
        ConfigError: A weight is no number and no FIRST:LAST.
    """
    return options.weighted(compared(options, source), share)


def states_weight_at(options: DistillOptions, share: float) -> float | None:
    """The weight of the intermediate states when this share of the training is done; None for the balanced one."""
    return None if options.states_weight == BALANCED else _weight("states_weight", options.states_weight, share)


def _weight(name: str, text: str, share: float) -> float:
    try:
        first, last = (float(word) for word in (text.split(":") * 2)[:2])
        if text.count(":") > 1:
            raise ValueError(text)
    except ValueError as error:
        flag = f"--distill-{name.replace('_', '-')}"
        legal = "a number, or FIRST:LAST" + (f", or {BALANCED}" if name == "states_weight" else "")
        raise ConfigError(f"{flag} is no weight", got=text, legal=legal) from error
    return first + (last - first) * min(max(share, 0.0), 1.0)
