"""A teacher on a layout of its own, on the student's ranks: it runs a whole step before the student begins it.

All micro-batches of a step go through the teacher's own tensor- and pipeline-parallel model; what the loss needs, its
last hidden states and those that are matched, is handed to the student's last stage. Logits are made there, as with any
teacher: each rank holds the teacher's output rows of its own part of the vocabulary.
"""

from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core import dist_checkpointing
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ext.checkpoint.reader import Reader
from megatron_ext.distillation import states
from megatron_ext.distillation.handover import Grid, Place, exchange, shares, transfers
from megatron_ext.distillation.losses import Head
from megatron_ext.distillation.model import StepLosses, named
from megatron_ext.distillation.states import EMBEDDING, FINAL, TEACHER, Part, Point
from megatron_ext.distillation.taps import Taps, pattern_of
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.models import axes
from megatron_ext.models.builder import PatternModelBuilder, model_config, with_architecture
from megatron_ext.models.config import Architecture
from megatron_ext.models.hidden import hidden_states


class Elsewhere:
    """This rank's part of the teacher.

    Args:
        teacher: The teacher.
        grid: Its layout.
        args: Megatron's validated namespace.
        points: The states that are wanted beside the last ones.
        architecture: The student's.
        groups: The student's process groups.
    """

    def __init__(
        self,
        teacher: Teacher,
        grid: Grid,
        args: Namespace,
        points: Sequence[Point],
        architecture: Architecture,
        groups: Any,
    ) -> None:
        self._args, self._groups = args, groups
        own = teacher.beside(architecture)
        self._pgs = _process_groups(grid)
        self._chunk = _build(own, grid, args, self._pgs)
        _load(self._chunk, teacher, self._pgs)
        self._stage, self._last = self._pgs.pp.rank(), self._pgs.pp.size() - 1
        sizes = [len(stage) for stage in pattern_of(self._chunk).stages]
        wanted = [point for point in points if point.kind != FINAL]
        self._points = [[p for p in wanted if _born(p, sizes) == stage] for stage in range(len(sizes))]
        self._taps = Taps(self._chunk, self._points[self._stage])
        self.order = [point for stage in self._points for point in stage]
        """The states beside the last ones, as they come side by side."""
        self.width = own.hidden_size
        here = (
            Place(groups.dp.rank(), groups.cp.rank(), groups.tp.rank(), groups.pp.rank()),
            Place(self._pgs.dp.rank(), 0, self._pgs.tp.rank(), self._stage),
        )
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, here)
        self._students, self._teachers = [list(column) for column in zip(*places, strict=True)]
        self.rows: Tensor | None = None
        if groups.pp.rank() == groups.pp.size() - 1:
            self.rows = _output_rows(teacher, own, groups).to(args.params_dtype)
        self.queue: deque[Float[Tensor, "s b w"]] = deque()

    @torch.no_grad()
    def before_schedule(self, data: Any, micro_batches: int, micro_batch_size: int) -> Any:
        """Run the teacher on all micro-batches of a step; on every rank (see `platform.loop.before_schedule`)."""
        iterators = data if isinstance(data, list) else [data]
        ahead: list[Any] = []
        if self._students[dist.get_rank()] == Place(self._groups.dp.rank(), 0, 0, 0):
            ahead = [next(iterators[0]) for _ in range(micro_batches)]
        tokens = self._gather([sample["tokens"] for sample in ahead], micro_batches * micro_batch_size)
        run = shares(len(tokens), self._pgs.dp.size())[self._pgs.dp.rank()]
        outputs = self._run(tokens[run.start : run.stop], micro_batch_size)
        plan = transfers(self._students, self._teachers, len(tokens))
        parts = self._groups.cp.size()
        like = self._empty(tokens.shape[1] // parts, self.width * (1 + len(self.order)))
        arrived = exchange(plan, dict(zip(run, outputs, strict=False)), like, parts)
        assert not self.queue, "the student has left micro-batches of the step before"
        own = sorted(arrived)
        for start in range(0, len(own), micro_batch_size):
            self.queue.append(torch.stack([arrived[i] for i in own[start : start + micro_batch_size]], dim=1))
        if not ahead:
            return data
        iterators = [iter(ahead), *iterators[1:]]
        return iterators if isinstance(data, list) else iterators[0]

    def _gather(self, tokens: list[Int[Tensor, "b s"]], per_replica: int) -> Int[Tensor, "n s"]:
        """The tokens of the global batch on every rank, ordered by the student's replicas."""
        length = self._args.seq_length
        device = torch.cuda.current_device()
        own = torch.zeros(per_replica, length, dtype=torch.int32, device=device)
        if tokens:
            own.copy_(torch.cat(tokens))
        everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, own)
        readers = sorted((place.replica, rank) for rank, place in enumerate(self._students) if place[1:] == (0, 0, 0))
        return torch.cat([everywhere[rank] for _, rank in readers]).long()

    def _run(self, tokens: Int[Tensor, "n s"], size: int) -> list[Float[Tensor, "s w"]]:
        """What the last stage knows of each sequence: its states side by side; nothing on the other stages."""
        outputs: list[Tensor] = []
        before, after = (self._neighbour(step) for step in (-1, 1))
        incoming, outgoing = (self._parts(stage) for stage in (self._stage - 1, self._stage))
        sent: list[tuple[Any, Tensor]] = []
        for some in tokens.split(size):
            found: dict[str, Tensor] = {}
            if before is not None:
                packed = self._empty(some.shape[1], len(some), sum(part.width for part in incoming))
                dist.recv(packed, before)
                found = states.unpack(incoming, packed)
            self._chunk.set_input_tensor(found.get(TEACHER))  # type: ignore[arg-type] - None on the first stage
            positions = torch.arange(some.shape[1], device=some.device).expand_as(some)
            found[TEACHER] = hidden_states(self._chunk, some, positions, None)
            found |= named(TEACHER, self._taps.take(), found[TEACHER])
            packed = states.pack(outgoing, found)
            if after is None:
                outputs += packed.unbind(1)
            else:
                sent.append((dist.isend(packed, after), packed))
        for work, _ in sent:
            work.wait()
        return outputs

    def _parts(self, stage: int) -> list[Part]:
        known = [point for points in self._points[: stage + 1] for point in points]
        names = [TEACHER, *(states.state(TEACHER, point) for point in known)]
        return [Part(name, self.width, False) for name in names]

    def _neighbour(self, step: int) -> int | None:
        stage = self._stage + step
        if not 0 <= stage <= self._last:
            return None
        own = self._teachers[dist.get_rank()]
        return self._teachers.index(own._replace(stage=stage))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self._args.params_dtype, device=torch.cuda.current_device())


class TeacherElsewhere:
    """What the student's stages see of it (see `model.TeacherSide`)."""

    def __init__(self, teacher: Elsewhere, student: HybridModel) -> None:
        self._teacher, self._student = teacher, student

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """On the last stage the states of the next micro-batch; the last ones are whole in the sequence."""
        if not self._student.post_process:
            return {}
        last, *others = self._teacher.queue.popleft().split(self._teacher.width, dim=-1)
        found = dict(zip(self._teacher.order, others, strict=True)) | {Point(FINAL): last}
        if self._student.config.sequence_parallel:
            group = self._student.pg_collection.tp
            found = {point: value.chunk(group.size())[group.rank()] for point, value in found.items()}
        return {TEACHER: last.contiguous(), **{states.state(TEACHER, point): value for point, value in found.items()}}

    def target(self, found: dict[str, Tensor], sample_id: Tensor, labels: Tensor, k: int) -> Head:
        """What its logits are made of."""
        assert self._teacher.rows is not None
        return Head(found[TEACHER], self._teacher.rows)

    def loss(self, found: dict[str, Tensor], labels: Tensor, mask: Tensor) -> StepLosses | None:
        """None: it is not trained."""
        return None


def _born(point: Point, sizes: Sequence[int]) -> int:
    if point.kind == EMBEDDING:
        return 0
    return next(stage for stage in range(len(sizes)) if point.layer < sum(sizes[: stage + 1]))


def _process_groups(grid: Grid) -> ProcessGroupCollection:
    replicas = dist.get_world_size() // (grid.tp * grid.pp)
    ranks = HyperCommGrid([grid.tp, 1, replicas, grid.pp], ["tp", "cp", "dp", "pp"])
    names: dict[str, str | list[str]] = {
        "tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "mp": ["tp", "pp"], "dp_cp": ["cp", "dp"],
        "tp_cp": ["tp", "cp"], "tp_dp_cp": ["tp", "cp", "dp"],
    }  # fmt: skip
    groups = {name: ranks.create_pg(dims) for name, dims in names.items()}
    return ProcessGroupCollection(**groups, embd=None, pos_embd=None)


def _build(own: Architecture, grid: Grid, args: Namespace, groups: Any) -> HybridModel:
    layout = Namespace(**vars(args))
    layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size = grid
    layout.tensor_parallel_num_weight_shards = grid.tp
    layout.virtual_pipeline_model_parallel_size, layout.context_parallel_size = None, 1
    layout.sequence_parallel = False  # nothing is kept for a backward pass
    layout = with_architecture(layout, own)
    config = model_config(layout, own)
    config.transformer.perform_initialization = False  # every weight is read
    config.share_embeddings_and_output_weights = False  # of the output layer, which is not used here
    chunk = PatternModelBuilder(config).build_model(groups)
    chunk = chunk.to(device=torch.cuda.current_device(), dtype=config.transformer.params_dtype)
    return chunk.requires_grad_(False).eval()


def _load(chunk: HybridModel, teacher: Teacher, groups: Any) -> None:
    """Read all weights but those of the output layer, which is removed."""
    metadata = dict(dist_checkpointing.load_content_metadata(str(teacher.step)) or {}) | {"dp_cp_group": groups.dp_cp}
    wanted = chunk.sharded_state_dict(metadata=metadata)
    wanted = {key: value for key, value in wanted.items() if not key.startswith("output_layer")}
    found: Any = dist_checkpointing.load({"0": wanted}, str(teacher.step))
    if chunk.post_process:
        del chunk.output_layer
    chunk.load_state_dict(found["0"])


def _output_rows(teacher: Teacher, own: Architecture, groups: Any) -> Float[Tensor, "v h"]:
    """The teacher's output rows of this rank's part of the student's vocabulary; padding that it lacks is zero."""
    key = axes.OUTPUT_LAYER if own.untie_embeddings_and_output_weights else axes.EMBEDDING
    whole = Reader(teacher.step).read(key)
    columns = own.vocab_size // groups.tp.size()
    rows = whole[groups.tp.rank() * columns : (groups.tp.rank() + 1) * columns]
    return torch.nn.functional.pad(rows, (0, 0, 0, columns - len(rows))).to(torch.cuda.current_device())
