"""The distillation job: a student and its frozen teacher in Megatron's own loop."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.arguments import option
from megatron_ext.distillation.cache import Cache
from megatron_ext.distillation.divergences import NAMES
from megatron_ext.distillation.losses import Losses
from megatron_ext.distillation.objective import Objective
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.training.cache import DEFAULT_K, Writing, check_cache, check_writing, compared
from megatron_ext.training.launch import Job, Launch


@dataclass(frozen=True)
class DistillOptions:
    """Whom the student learns from, and how the losses are weighted."""

    teacher: str | None = option(None, "Checkpoint of the teacher: a directory of steps, or one step.")
    cache: str | None = option(None, "Directory of a cache, in place of the teacher.")
    cache_write: str | None = option(
        None, "Train nothing; store the teacher's likeliest next tokens of one pass over the data in this directory."
    )
    cache_dtype: Literal["float16", "float32"] = option("float16", "In which their probabilities are stored.")
    temperature: float | None = option(
        None, "Temperature of both distributions; the loss is multiplied by its square. Default: 1, or the cache's."
    )
    loss: str | None = option(
        None, f"How student and teacher are compared: {', '.join(NAMES)}. Default: forward-kl; with a cache top-k-rest."
    )
    kd_weight: str = option("1.0", "Weight of that loss: a number, or FIRST:LAST to go in a line over the training.")
    ce_weight: str = option("0.0", "Weight of the cross-entropy with the data's next token: likewise.")
    jsd_beta: float = option(0.5, "Of jsd: the teacher's share of the mixture.")
    top_k: int | None = option(
        None,
        "Of top-k and top-k-rest: how many of the teacher's entries count one by one; of a cache: how many are stored. "
        f"Default: {DEFAULT_K}, or all that the cache holds.",
    )


JOB = Job("distill", options={"distill": DistillOptions})


def check(launch: Launch) -> Teacher | Cache | Writing:
    """Find what is wrong with the options, and with whom the student learns from, before any process group.

    Raises:
        ConfigError: An option is missing or illegal, the vocabularies differ, or the teacher does not fit the layout.
        CheckpointError: There is no usable checkpoint of the teacher.
        DataError: There is no usable cache.
    """
    args, options = launch.args, launch.options["distill"]
    if getattr(args, "use_mup", False):  # it scales the logits, which the losses make themselves
        raise ConfigError("distillation does not go with --use-mup")
    if options.cache_write is not None:
        return check_writing(launch, _tokens())
    source = _source(options)
    for share in (0.0, 1.0):
        objective = objective_at(options, source, share)
        objective.check(_tokens())
        if min(objective.kd_weight, objective.ce_weight) < 0 or not objective.kd_weight + objective.ce_weight > 0:
            raise ConfigError(
                "--distill-kd-weight and --distill-ce-weight must not be negative, nor both zero",
                got=f"{options.kd_weight} and {options.ce_weight}",
            )
    if isinstance(source, Cache):
        check_cache(launch, source, compared(options, source), _tokens())
        return source
    source.check(
        launch.architecture,
        tokens=_tokens(),
        student_multiple=args.make_vocab_size_divisible_by * args.tensor_model_parallel_size,
        tp=args.tensor_model_parallel_size,
        stages=args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1),
        ep=args.expert_model_parallel_size,
    )
    return source


def _source(options: DistillOptions) -> Teacher | Cache:
    if options.cache is not None and options.teacher is not None:
        raise ConfigError("--distill-teacher and --distill-cache are one too many", legal="one of them")
    if options.cache is not None:
        return Cache.find(options.cache)
    if options.teacher is None:
        raise ConfigError(
            "--distill-teacher is missing", legal="the checkpoint directory of the teacher, or --distill-cache"
        )
    return Teacher.find(options.teacher)


def distill(launch: Launch, source: Teacher | Cache) -> None:
    """Train the student until `--train-iters`.

    `metrics.jsonl` has `loss` and `val_loss`, the student's cross-entropy as in pre-training, and `kd_loss`; also
    `total_loss`, what is minimised, where that is neither of them.
    """
    from megatron_ext.distillation.cached import with_cache
    from megatron_ext.distillation.model import with_teacher
    from megatron_ext.training import passes, run
    from megatron_ext.training.data import build_datasets, get_identified_batch
    from megatron_ext.training.step import forward_step

    options: DistillOptions = launch.options["distill"]

    def now() -> Objective:
        done = getattr(launch.args, "curr_iteration", None) or launch.args.iteration
        return objective_at(options, source, done / max(1, (launch.args.train_iters or 1) - 1))

    def hook(students: list[Any]) -> list[Any]:
        if isinstance(source, Cache):
            return with_cache(students, source, now)
        return with_teacher(students, source, launch.args, launch.architecture, now, _tokens())

    weights = [(o.kd_weight, o.ce_weight) for o in (objective_at(options, source, share) for share in (0.0, 1.0))]
    mixed = weights not in ([(1.0, 0.0)] * 2, [(0.0, 1.0)] * 2)
    run.train(
        launch,
        partial(forward_step, loss=partial(masked_sums, mixed), batch_of=get_identified_batch),
        hooks=(hook,),
        datasets=passes.repeated(source.manifest.seed) if isinstance(source, Cache) else build_datasets,
    )


def masked_sums(
    mixed: bool, loss_mask: Float[Tensor, "b s"], losses: Losses
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss contract: sum of `total` over unmasked tokens, how many they are, and each component to log.

    Args:
        mixed: Whether to log `total` too.
        loss_mask: 1 where a token counts.
        losses: Of each token.
    """
    mask = loss_mask.T.float()
    count = mask.sum().to(torch.int)
    sums = {"lm loss": (losses.ce * mask).sum(), "kd loss": (losses.kd * mask).sum()}
    if mixed:
        sums["total loss"] = losses.total
    return losses.total, count, {name: torch.cat([x.detach().view(1), count.view(1)]) for name, x in sums.items()}


def objective_at(options: DistillOptions, source: Teacher | Cache, share: float) -> Objective:
    """What the options ask for when this share of the training is done.

    Raises:
        ConfigError: A weight is no number and no FIRST:LAST.
    """
    kd_weight, ce_weight = (_weight(name, getattr(options, name), share) for name in ("kd_weight", "ce_weight"))
    return replace(compared(options, source), kd_weight=kd_weight, ce_weight=ce_weight)


def _weight(name: str, text: str, share: float) -> float:
    try:
        first, last = (float(word) for word in (text.split(":") * 2)[:2])
        if text.count(":") > 1:
            raise ValueError(text)
    except ValueError as error:
        flag = f"--distill-{name.replace('_', '-')}"
        raise ConfigError(f"{flag} is no weight", got=text, legal="a number, or FIRST:LAST") from error
    return first + (last - first) * min(max(share, 0.0), 1.0)


def _tokens() -> int:
    """Entries of the tokenizer, without padding."""
    from megatron.training import get_tokenizer

    tokenizer: Any = get_tokenizer()
    return tokenizer.vocab_size
