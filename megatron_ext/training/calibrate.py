"""The calibration pass: a model runs over data, hooks measure, nothing is trained."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ext.pruning import tasks
from megatron_ext.pruning.ablation import Ablation
from megatron_ext.pruning.depth import STATIC, Influence
from megatron_ext.pruning.importance import Importance, WidthMetric
from megatron_ext.pruning.leave_out import Sampling, measure
from megatron_ext.training.evaluate import forward_all, micro_batches
from megatron_ext.training.launch import Launch

REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Calibration:
    """What to measure.

    Attributes:
        samples: Sequences of the training split; a multiple of `--global-batch-size`.
        width: How width is measured.
        depth: A metric of `budget.DEPTH_CHOICES`; the static ones are measured in any case.
        blocks: Whether whole blocks will be chosen, or sub-layers.
        run: For a scan, how many of them it leaves out.
        sampling: For Shapley values.
        memory: Bytes of activations that a rank may keep, so that nothing is run twice.
        task: `package.module:function`, or nothing.
    """

    samples: int
    width: WidthMetric = field(default_factory=WidthMetric)
    depth: str = "block_influence"
    blocks: bool = True
    run: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    memory: int = 8 * 2**30
    task: str | None = None


def calibrate(
    launch: Launch, model: list[Any], calibration: Calibration
) -> tuple[dict[str, torch.Tensor] | None, float]:
    """Score a model.

    Args:
        launch: The validated command line.
        model: From `evaluate.load_model`.
        calibration: What to measure.

    Returns:
        The scores on rank 0 (None elsewhere), and the model's mean loss on the samples, nats per token.
    """
    from megatron.core.utils import unwrap_model

    args = launch.args
    chunks = unwrap_model(model)
    batches = micro_batches(launch, model, "train", calibration.samples)
    steps = calibration.samples // args.global_batch_size
    importance = Importance(chunks, launch.architecture, calibration.width)
    influence = Influence(chunks, launch.architecture)
    loss = forward_all(launch, model, _iterators(batches), steps, _scored(args.rank))
    importance.remove()
    influence.remove()
    width, depth = importance.gather(), influence.gather()
    left_out: dict[str, torch.Tensor] = {}
    if calibration.depth not in STATIC:
        left_out = _leave_out(launch, calibration, model, chunks, batches)
    if width is None or depth is None:
        return None, loss
    return width | depth | left_out, loss


def _leave_out(
    launch: Launch, calibration: Calibration, model: list[Any], chunks: list[Any], batches: list[Any]
) -> dict[str, torch.Tensor]:
    args = launch.args
    run_task = None
    if calibration.task is not None:
        asked, asked_steps = _task_batches(launch, calibration.task, len(model))
        run_task = lambda: forward_all(launch, model, _iterators(asked), asked_steps)  # noqa: E731
    steps = calibration.samples // args.global_batch_size
    ablation = Ablation(
        chunks, launch.architecture,
        lambda: forward_all(launch, model, _iterators(batches), steps),
        tokens=calibration.samples // args.data_parallel_size * args.seq_length // args.context_parallel_size,
        memory=calibration.memory, run_task=run_task,
    )  # fmt: skip
    try:
        return measure(
            ablation, launch.architecture, calibration.depth, blocks=calibration.blocks, run=calibration.run,
            sampling=calibration.sampling, progress=_Lines(args.rank),
        )  # fmt: skip
    finally:
        ablation.remove()


def _task_batches(launch: Launch, name: str, num_chunks: int) -> tuple[list[Any], int]:
    """The task's samples as this rank's micro-batches for each chunk, and how many global batches they fill."""
    from megatron.core import mpu
    from megatron.training import get_tokenizer

    args = launch.args
    samples = list(tasks.load_task(name)(get_tokenizer(), args.seq_length, args.seed))
    steps = -(-len(samples) // args.global_batch_size)
    micro = args.micro_batch_size
    padded = tasks.batches(samples, args.seq_length, args.global_batch_size)
    rank, size = mpu.get_data_parallel_rank(), args.data_parallel_size
    own = []
    for batch in padded:
        for first in range(rank * micro, args.global_batch_size, micro * size):
            own.append({key: value[first : first + micro].contiguous() for key, value in batch.items()})
    return [own] * num_chunks, steps


def _iterators(batches: list[Any]) -> list[Any]:
    return [iter(own) if own is not None else None for own in batches]


def _scored(rank: int):
    def progress(done: int, total: int) -> None:
        if rank == 0:
            print(f"scored {done} of {total} sequences", flush=True)

    return progress


class _Lines:
    """Prints a line on rank 0, but not more often than every few seconds."""

    def __init__(self, rank: int) -> None:
        self._rank, self._last, self._count = rank, 0.0, 0

    def __call__(self, line: str) -> None:
        self._count += 1
        if self._rank == 0 and time.monotonic() - self._last > REPORT_SECONDS:
            self._last = time.monotonic()
            print(f"[evaluation {self._count}] {line}", flush=True)
