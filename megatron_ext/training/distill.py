"""The distillation job: a student and its frozen teacher in Megatron's own loop."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.arguments import option
from megatron_ext.distillation.divergences import NAMES
from megatron_ext.distillation.losses import Losses
from megatron_ext.distillation.objective import Objective
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.training.launch import Job, Launch


@dataclass(frozen=True)
class DistillOptions:
    """Whom the student learns from, and how the losses are weighted."""

    teacher: str | None = option(None, "Checkpoint of the teacher: a directory of steps, or one step.")
    temperature: float = option(1.0, "Temperature of both distributions; the loss is multiplied by its square.")
    loss: str = option("forward-kl", f"How student and teacher are compared: {', '.join(NAMES)}.")
    kd_weight: str = option("1.0", "Weight of that loss: a number, or FIRST:LAST to go in a line over the training.")
    ce_weight: str = option("0.0", "Weight of the cross-entropy with the data's next token: likewise.")
    jsd_beta: float = option(0.5, "Of jsd: the teacher's share of the mixture.")
    top_k: int = option(100, "Of top-k and top-k-rest: how many of the teacher's entries count one by one.")


JOB = Job("distill", options={"distill": DistillOptions})


def check(launch: Launch) -> Teacher:
    """Find what is wrong with the options, and the teacher, before any process group.

    Raises:
        ConfigError: An option is missing or illegal, the vocabularies differ, or the teacher does not fit the layout.
        CheckpointError: There is no usable checkpoint of the teacher.
    """
    args, options = launch.args, launch.options["distill"]
    if options.teacher is None:
        raise ConfigError("--distill-teacher is missing", legal="the checkpoint directory of the teacher")
    if getattr(args, "use_mup", False):  # it scales the logits, which the losses make themselves
        raise ConfigError("distillation does not go with --use-mup")
    for share in (0.0, 1.0):
        objective = objective_at(options, share)
        objective.check(_tokens())
        if min(objective.kd_weight, objective.ce_weight) < 0 or not objective.kd_weight + objective.ce_weight > 0:
            raise ConfigError(
                "--distill-kd-weight and --distill-ce-weight must not be negative, nor both zero",
                got=f"{options.kd_weight} and {options.ce_weight}",
            )
    teacher = Teacher.find(options.teacher)
    teacher.check(
        launch.architecture,
        tokens=_tokens(),
        student_multiple=args.make_vocab_size_divisible_by * args.tensor_model_parallel_size,
        tp=args.tensor_model_parallel_size,
        stages=args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1),
        ep=args.expert_model_parallel_size,
    )
    return teacher


def distill(launch: Launch, teacher: Teacher) -> None:
    """Train the student until `--train-iters`.

    `metrics.jsonl` has `loss` and `val_loss`, the student's cross-entropy as in pre-training, and `kd_loss`; also
    `total_loss`, what is minimised, where that is neither of them.
    """
    from megatron_ext.distillation.model import with_teacher
    from megatron_ext.training import run
    from megatron_ext.training.step import forward_step

    options: DistillOptions = launch.options["distill"]

    def now() -> Objective:
        done = getattr(launch.args, "curr_iteration", None) or launch.args.iteration
        return objective_at(options, done / max(1, (launch.args.train_iters or 1) - 1))

    def hook(students: list[Any]) -> list[Any]:
        return with_teacher(students, teacher, launch.args, launch.architecture, now, _tokens())

    weights = [(o.kd_weight, o.ce_weight) for o in (objective_at(options, 0.0), objective_at(options, 1.0))]
    mixed = weights not in ([(1.0, 0.0)] * 2, [(0.0, 1.0)] * 2)
    run.train(launch, partial(forward_step, loss=partial(masked_sums, mixed)), hooks=(hook,))


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


def objective_at(options: DistillOptions, share: float) -> Objective:
    """What the options ask for when this share of the training is done.

    Raises:
        ConfigError: A weight is no number and no FIRST:LAST.
    """
    kd_weight, ce_weight = (_weight(name, getattr(options, name), share) for name in ("kd_weight", "ce_weight"))
    return Objective(options.loss, options.temperature, kd_weight, ce_weight, options.jsd_beta, options.top_k)


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
