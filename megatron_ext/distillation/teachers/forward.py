"""A teacher on a layout of its own: forward passes through its own tensor- and pipeline-parallel model."""

from argparse import Namespace
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

from megatron_ext.distillation import intermediate_layers
from megatron_ext.distillation.intermediate_layers import EMBEDDING, FINAL, TEACHER, LayerOutput, MessagePart
from megatron_ext.distillation.model import named
from megatron_ext.distillation.teachers.exchange import ParallelSizes, RankCoordinates, split_batch
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.lm_head.hidden_states import hidden_states
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.builder import PatternModelBuilder, model_config, with_architecture
from megatron_ext.models.hooks import HiddenStateRecorder, pattern_of


class TeacherForward:
    """This rank's part of a teacher on a layout of its own.

    Args:
        teacher: The teacher.
        grid: Its layout over the ranks of the default process group.
        args: Megatron's validated namespace.
        points: The states that are wanted beside the last ones.
        architecture: The student's.
    """

    def __init__(
        self,
        teacher: Teacher,
        grid: ParallelSizes,
        args: Namespace,
        points: Sequence[LayerOutput],
        architecture: Architecture,
    ) -> None:
        own = teacher.with_student_vocab(architecture)
        self._type = args.params_dtype
        self._groups = _process_groups(grid)
        self._chunk = _build(own, grid, args, self._groups)
        _load(self._chunk, teacher, self._groups)
        self._stage, self._last = self._groups.pp.rank(), grid.pp - 1
        self._points = by_stage(points, [len(stage) for stage in pattern_of(self._chunk).stages])
        self._taps, self._width = HiddenStateRecorder(self._chunk, self._points[self._stage]), own.hidden_size
        self._names = intermediate_layers.names(TEACHER, self._points[self._stage])
        # What arrives in each micro-batch, and what is handed on.
        self._incoming, self._outgoing = (self._parts(stage) for stage in (self._stage - 1, self._stage))
        self.place = RankCoordinates(self._groups.dp.rank(), 0, self._groups.tp.rank(), self._stage)

    def share(self, samples: int) -> range:
        """The sequences of a global batch that this rank's replica runs."""
        return split_batch(samples, self._groups.dp.size())[self.place.replica]

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "n s"], size: int) -> list[Float[Tensor, "s w"]]:
        """What the last stage knows of each sequence: its states side by side; nothing on the other stages.

        Args:
            tokens: Sequences.
            size: How many go through at once.
        """
        outputs: list[Tensor] = []
        sent: list[tuple[Any, Tensor]] = []
        for some in tokens.split(size):
            found: dict[str, Tensor] = {}
            if self._stage:
                packed = empty(self._type, some.shape[1], len(some), sum(part.width for part in self._incoming))
                dist.recv(packed, group=self._groups.pp, group_src=self._stage - 1)
                found = intermediate_layers.unpack(self._incoming, packed)
            self._chunk.set_input_tensor(found.get(TEACHER))  # type: ignore[arg-type] - None on the first stage
            positions = torch.arange(some.shape[1], device=some.device).expand_as(some)
            found[TEACHER] = hidden_states(self._chunk, some, positions, None)
            found |= named(self._names, self._taps.take(), found[TEACHER])
            packed = intermediate_layers.pack(self._outgoing, found)
            if self._stage == self._last:
                outputs += packed.unbind(1)
            else:
                sent.append((dist.isend(packed, group=self._groups.pp, group_dst=self._stage + 1), packed))
        for work, _ in sent:
            work.wait()
        return outputs

    def _parts(self, stage: int) -> list[MessagePart]:
        known = [point for points in self._points[: stage + 1] for point in points]
        names = [TEACHER, *(intermediate_layers.state(TEACHER, point) for point in known)]
        return [MessagePart(name, self._width, False) for name in names]


def by_stage(points: Sequence[LayerOutput], sizes: Sequence[int]) -> list[list[LayerOutput]]:
    """The states that come to be on each stage of the teacher; the last ones are not counted."""

    def stage_of(point: LayerOutput) -> int:
        if point.kind == EMBEDDING:
            return 0
        return next(stage for stage in range(len(sizes)) if point.layer < sum(sizes[: stage + 1]))

    wanted = [point for point in points if point.kind != FINAL]
    return [[point for point in wanted if stage_of(point) == stage] for stage in range(len(sizes))]


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor on this rank's device."""
    return torch.empty(*shape, dtype=dtype, device=torch.cuda.current_device())


def _process_groups(grid: ParallelSizes) -> ProcessGroupCollection:
    replicas = dist.get_world_size() // (grid.tp * grid.pp)
    ranks = HyperCommGrid([grid.tp, 1, replicas, grid.pp], ["tp", "cp", "dp", "pp"])
    names: dict[str, str | list[str]] = {
        "tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "mp": ["tp", "pp"], "dp_cp": ["cp", "dp"],
        "tp_cp": ["tp", "cp"], "tp_dp_cp": ["tp", "cp", "dp"],
    }  # fmt: skip
    groups = {name: ranks.create_pg(dims) for name, dims in names.items()}
    return ProcessGroupCollection(**groups, embd=None, pos_embd=None)


def _build(own: Architecture, grid: ParallelSizes, args: Namespace, groups: Any) -> HybridModel:
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
