"""The calibration pass: a model runs over data, hooks measure, nothing is trained."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.errors import ConfigError
from megatron_ext.pruning.ablation import Ablation, Passes
from megatron_ext.pruning.depth import BlockInfluence
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change
from megatron_ext.pruning.importance import Importance, WidthMetric
from megatron_ext.pruning.leave_out import ShapleySampling, measure, scan_task
from megatron_ext.pruning.left_out import LeftOut
from megatron_ext.pruning.pruned_family import Measured
from megatron_ext.reports.progress import Progress
from megatron_ext.training.forward import forward_all, forward_sums, micro_batches
from megatron_ext.training.job import RunConfig

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel


@dataclass(frozen=True)
class Calibration:
    """What to measure.

    Attributes:
        samples: Sequences of the training split; a multiple of `--global-batch-size`.
        width: How width is measured; None if it is not.
        depth: A metric of `DEPTH_METRICS`; those of a `Change` are measured in any case.
        blocks: Whether whole blocks will be chosen, or sub-layers.
        kinds: The kinds of sub-layers of which some will be chosen; empty for all.
        run: For a scan, how many of them it leaves out.
        sampling: For Shapley values.
        depth_samples: Sequences that a model without some layers is run on: of `samples` the first, in whole batches.
        memory: Bytes of activations that a rank may keep, so that nothing is run twice.
    """

    samples: int
    width: WidthMetric | None = field(default_factory=WidthMetric)
    depth: str = "block_influence"
    blocks: bool = True
    kinds: str = ""
    run: int = 0
    sampling: ShapleySampling = field(default_factory=ShapleySampling)
    depth_samples: int = 0
    memory: int = 8 * 2**30


def calibrate(
    run: RunConfig,
    model: list[Any],
    calibration: Calibration,
    judge: "Callable[[ShardedModel], Callable[[], float]] | None" = None,
) -> Measured:
    """Score a model.

    Args:
        run: The validated command line.
        model: From `evaluate.load_model`.
        calibration: What to measure.
        judge: For `scan_task`: makes of the model what measures its score.

    Raises:
        ConfigError: The model never answers the task, which can then say nothing about its layers.
    """
    from megatron.core.utils import unwrap_model

    args = run.args
    chunks = unwrap_model(model)
    asked, task = None, None
    if judge is not None:
        asked, task = _whole_score(run, chunks, judge)  # before an hour of other work
    batches = micro_batches(run, model, "train", calibration.samples)
    steps = calibration.samples // args.global_batch_size
    hooks: list[Any] = [BlockInfluence(chunks, run.architecture)]
    if calibration.width is not None:
        hooks.append(Importance(chunks, run.architecture, calibration.width))
    with Progress("scoring") as shown:
        loss = forward_all(run, model, _iterators(batches), steps, shown.update)["loss"]
    if args.rank == 0:
        print(f"scored {calibration.samples:,} sequences", flush=True)
    for hook in hooks:
        hook.remove()
    parts = [hook.gather() for hook in hooks]
    if asked is not None and task is not None:
        left_out = LeftOut(chunks, run.architecture)
        try:
            with Progress("evaluation") as shown:
                parts.append(
                    scan_task(
                        left_out, run.architecture, asked, task, blocks=calibration.blocks, run=calibration.run,
                        progress=lambda line: shown.update(shown.done + 1, note=line),
                    )
                )  # fmt: skip
        finally:
            left_out.remove()
    elif not isinstance(DEPTH_METRICS[calibration.depth], Change):
        parts.append(_leave_out(run, calibration, model, chunks, batches))
    values = {name: value for part in parts for name, value in (part or {}).items()}
    return Measured(None if args.rank else values, loss, task)


def _whole_score(
    run: RunConfig, chunks: list[Any], judge: "Callable[[ShardedModel], Callable[[], float]]"
) -> tuple[Callable[[], float], float]:
    """What measures a score, and the whole model's."""
    from megatron_ext.inference.sharded import ShardedModel
    from megatron_ext.pruning.task_scoring import vocab_size

    asked = judge(ShardedModel(chunks, run.architecture, vocab_size(run)))
    score = asked()
    if score == 0:
        raise ConfigError(
            "the model never answers the task, which then cannot choose layers", got="a score of 0",
            legal="an easier task, such as a choice (megatron_ext.evaluation.synthetic:phonebook_choice), or another "
            "--prune-depth-metric",
        )  # fmt: skip
    return asked, score


def _leave_out(
    run: RunConfig, calibration: Calibration, model: list[Any], chunks: list[Any], batches: list[Any]
) -> dict[str, torch.Tensor]:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    args = run.args

    def loss_sums(begin: int, end: int) -> tuple[float, float]:
        some = [own[begin:end] if own is not None else None for own in batches]
        return forward_sums(run, model, _iterators(some), end - begin)["loss"]

    passes = Passes(
        loss_sums,
        micro_batches=calibration.depth_samples // args.global_batch_size * get_num_microbatches(),
        tokens=args.micro_batch_size * args.seq_length // args.context_parallel_size,
        step=args.pipeline_model_parallel_size if len(model) > 1 else 1,
    )
    ablation = Ablation(
        chunks, run.architecture, passes, memory=calibration.memory, logits=DEPTH_METRICS[calibration.depth].logits
    )
    try:
        with Progress("evaluation") as shown:
            return measure(
                ablation, run.architecture, calibration.depth, blocks=calibration.blocks, kinds=calibration.kinds,
                run=calibration.run, sampling=calibration.sampling,
                progress=lambda line: shown.update(shown.done + 1, note=line),
            )  # fmt: skip
    finally:
        ablation.remove()


def _iterators(batches: list[Any]) -> list[Any]:
    return [iter(own) if own is not None else None for own in batches]
