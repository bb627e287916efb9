"""A teacher on a layout of its own, on the student's ranks or others: it runs a whole step before the student does.

All micro-batches of a step go through the teacher's own tensor- and pipeline-parallel model; what the loss needs, its
last hidden states and those that are matched, is handed to the student's last stage. Logits are made there, as with any
teacher: each rank holds the teacher's output rows of its own part of the vocabulary.
"""

from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.distillation import intermediate_layers
from megatron_ext.distillation.intermediate_layers import FINAL, TEACHER, LayerOutput
from megatron_ext.distillation.model import StepLosses
from megatron_ext.distillation.teachers.exchange import (
    BridgeGroup,
    ParallelSizes,
    RankCoordinates,
    exchange,
    state_transfers,
    token_transfers,
)
from megatron_ext.distillation.teachers.forward import TeacherForward, by_stage, empty
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.lm_head.losses import LMHead
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture

STOP, RUN = 0, 1


class RemoteForward:
    """The student's rank of a student whose teacher has another layout, on its ranks or on others.

    Args:
        teacher: The teacher.
        grid: Its layout.
        args: Megatron's validated namespace.
        points: The states that are wanted beside the last ones.
        architecture: The student's.
        groups: The student's process groups.
        bridge: All ranks, if the teacher's are others.
    """

    def __init__(
        self,
        teacher: Teacher,
        grid: ParallelSizes,
        args: Namespace,
        points: Sequence[LayerOutput],
        architecture: Architecture,
        groups: Any,
        bridge: BridgeGroup | None,
    ) -> None:
        self._args, self._groups, self._apart = args, groups, bridge is not None
        self._forward = None if bridge else TeacherForward(teacher, grid, args, points, architecture)
        self._bridge = bridge or BridgeGroup(None, dist.get_rank(), dist.get_world_size())
        own = teacher.with_student_vocab(architecture)
        self.width = own.hidden_size
        stages = by_stage(points, [len(stage) for stage in own.layers.split(grid.pp).stages])
        self.order = [point for stage in stages for point in stage]
        """The states beside the last ones, as they come side by side."""
        here = RankCoordinates(groups.dp.rank(), groups.cp.rank(), groups.tp.rank(), groups.pp.rank())
        self._reads = here[1:] == (0, 0, 0)
        self._places = self._bridge.places(here, self._forward.place if self._forward else None)
        self.rows: Tensor | None = None
        self.softcap = own.logits_softcap
        if groups.pp.rank() == groups.pp.size() - 1:
            self.rows = _output_rows(teacher, own, groups).to(args.params_dtype)
        self.queue: deque[Float[Tensor, "s b w"]] = deque()

    def before_schedule(self, data: Any, micro_batches: int, micro_batch_size: int) -> Any:
        """Let the teacher run all micro-batches of a step; on every rank (`megatron_patches.before_schedule`)."""
        iterators = data if isinstance(data, list) else [data]
        ahead = [next(iterators[0]) for _ in range(micro_batches)] if self._reads else []
        if self._apart:
            call(self._bridge, RUN, micro_batches, micro_batch_size)
        sizes = Sizes(micro_batches * micro_batch_size, self._args.seq_length, micro_batch_size)
        tokens = torch.cat([sample["tokens"] for sample in ahead]) if ahead else None
        wanted = self._args.seq_length // self._groups.cp.size(), self.width * (1 + len(self.order))
        like = empty(self._args.params_dtype, *wanted)
        arrived = step(self._bridge, self._places, self._forward, tokens, sizes, like, self._groups.cp.size())
        assert not self.queue, "the student has left micro-batches of the step before"
        own = sorted(arrived)
        for start in range(0, len(own), micro_batch_size):
            self.queue.append(torch.stack([arrived[i] for i in own[start : start + micro_batch_size]], dim=1))
        if not ahead:
            return data
        iterators = [iter(ahead), *iterators[1:]]
        return iterators if isinstance(data, list) else iterators[0]

    def close(self) -> None:
        """Let a teacher on ranks of its own end."""
        if self._apart:
            call(self._bridge, STOP, 0, 0)


class Sizes(NamedTuple):
    """Of a step.

    Attributes:
        per_replica: Sequences of each of the student's replicas.
        length: Tokens of a sequence.
        micro_batch: Sequences that go through the models at once.
    """

    per_replica: int
    length: int
    micro_batch: int


def serve(bridge: BridgeGroup, forward: TeacherForward, length: int, like: Float[Tensor, "l w"], parts: int) -> None:
    """What a rank of a teacher on ranks of its own does until the student ends.

    Args:
        bridge: All ranks.
        forward: This rank's part of the teacher.
        length: Tokens of a sequence.
        like: An empty tensor of the teacher's type.
        parts: The student's context-parallel size.
    """
    places = bridge.places(None, forward.place)
    while True:
        what, micro_batches, micro_batch_size = call(bridge, STOP, 0, 0)
        if what == STOP:
            return
        sizes = Sizes(micro_batches * micro_batch_size, length, micro_batch_size)
        step(bridge, places, forward, None, sizes, like, parts)


def call(bridge: BridgeGroup, *own: int) -> list[int]:
    """What the student's first rank says: run, micro-batches and sequences of each, or stop."""
    return bridge.gather(torch.tensor(own, device=torch.cuda.current_device()))[0].tolist()


def step(
    bridge: BridgeGroup,
    places: tuple[list[RankCoordinates | None], list[RankCoordinates | None]],
    forward: TeacherForward | None,
    tokens: Int[Tensor, "n s"] | None,
    sizes: Sizes,
    like: Float[Tensor, "l w"],
    parts: int,
) -> dict[int, Float[Tensor, "l w"]]:
    """One step of the teacher, on every rank: tokens from the student's readers, states to the student's last stage.

    No rank gets more than it runs or needs.

    Args:
        bridge: All ranks.
        places: Where they are in both layouts.
        forward: This rank's part of the teacher, if it has one.
        tokens: The student's sequences, on the ranks that read them.
        sizes: Of the step.
        like: An empty tensor of the shape that arrives for one sequence.
        parts: The student's context-parallel size.

    Returns:
        Of each sequence that this rank needs, its part.
    """
    device = torch.cuda.current_device()
    students = [place.replica for place in places[0] if place is not None]
    samples = sizes.per_replica * (max(students) + 1)
    own: dict[int, Tensor] = {}
    if tokens is not None:
        first = places[0][bridge.rank].replica * sizes.per_replica  # type: ignore[union-attr] - it reads the data
        own = {first + i: row.to(device, torch.int32).unsqueeze(-1) for i, row in enumerate(tokens)}
    row = torch.empty(sizes.length, 1, dtype=torch.int32, device=device)
    arrived = exchange(bridge, token_transfers(*places, samples), own, row, parts=1)
    known: dict[int, Tensor] = {}
    if forward is not None:
        run = forward.share(samples)
        wanted = [arrived[i].squeeze(-1).long() for i in run] if arrived else []
        # Behind its first stage only their number counts.
        inputs = torch.stack(wanted) if wanted else torch.zeros((), dtype=torch.long, device=device)
        outputs = forward.run(inputs.expand(len(run), sizes.length), sizes.micro_batch) if run else []
        known = dict(zip(run, outputs, strict=False))
    return exchange(bridge, state_transfers(*places, samples), known, like, parts)


class RemoteTeacher:
    """What the student's stages see of it (see `model.TeacherStage`)."""

    def __init__(self, teacher: RemoteForward, student: HybridModel) -> None:
        self._teacher, self._student = teacher, student

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """On the last stage the states of the next micro-batch; the last ones are whole in the sequence."""
        if not self._student.post_process:
            return {}
        last, *others = self._teacher.queue.popleft().split(self._teacher.width, dim=-1)
        found = dict(zip(self._teacher.order, others, strict=True)) | {LayerOutput(FINAL): last}
        if self._student.config.sequence_parallel:
            group = self._student.pg_collection.tp
            found = {point: value.chunk(group.size())[group.rank()] for point, value in found.items()}
        return {
            TEACHER: last.contiguous(),
            **{intermediate_layers.state(TEACHER, point): value for point, value in found.items()},
        }

    def target(self, found: dict[str, Tensor], sample_id: Tensor, labels: Tensor, k: int) -> LMHead:
        """What its logits are made of."""
        assert self._teacher.rows is not None
        return LMHead(found[TEACHER], self._teacher.rows, self._teacher.softcap)

    def loss(self, found: dict[str, Tensor], labels: Tensor, mask: Tensor) -> StepLosses | None:
        """None: it is not trained."""
        return None


def _output_rows(teacher: Teacher, own: Architecture, groups: Any) -> Float[Tensor, "v h"]:
    """The teacher's output rows of this rank's part of the student's vocabulary; padding that it lacks is zero."""
    key = axes.OUTPUT_LAYER if own.untie_embeddings_and_output_weights else axes.EMBEDDING
    whole = CheckpointReader(teacher.step).read(key)
    columns = own.padded_vocab_size // groups.tp.size()
    rows = whole[groups.tp.rank() * columns : (groups.tp.rank() + 1) * columns]
    return torch.nn.functional.pad(rows, (0, 0, 0, columns - len(rows))).to(torch.cuda.current_device())
