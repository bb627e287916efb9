"""Who hands what to whom, when a teacher runs on another layout than its student."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.platform.context_parallel import zigzag_split


class ParallelSizes(NamedTuple):
    """A teacher's layout; the other ranks are replicas that share the sequences.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
    """

    tp: int
    pp: int


class RankCoordinates(NamedTuple):
    """A rank's place in a layout.

    Attributes:
        replica: Its data-parallel rank.
        part: Its context-parallel rank: which part of the sequence it has.
        shard: Its tensor-parallel rank.
        stage: Its pipeline rank.
    """

    replica: int
    part: int
    shard: int
    stage: int


@dataclass(frozen=True)
class BridgeGroup:
    """All ranks of student and teacher.

    Attributes:
        group: Their process group; None for the default one.
        rank: This one's number.
        size: How many there are.
    """

    group: Any
    rank: int
    size: int

    def gather(self, own: Tensor) -> list[Tensor]:
        """What each rank has; all of one shape."""
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everywhere, own, group=self.group)
        return everywhere

    def places(
        self, student: RankCoordinates | None, teacher: RankCoordinates | None
    ) -> tuple[list[RankCoordinates | None], list[RankCoordinates | None]]:
        """Of each rank its place in the student's layout and in the teacher's; None where it has none."""
        nowhere = RankCoordinates(-1, -1, -1, -1)
        own = torch.tensor([student or nowhere, teacher or nowhere], device=torch.cuda.current_device())
        known = [[RankCoordinates(*row) for row in rows.tolist()] for rows in self.gather(own)]
        students, teachers = ([None if p == nowhere else p for p in column] for column in zip(*known, strict=True))
        return students, teachers


class Transfer(NamedTuple):
    """What one rank hands to another in a step: tokens to the teacher, or states to the student.

    Attributes:
        source: A rank that reads the student's data, or one of the teacher's last stage.
        destination: A rank of the teacher's first stage, or one of the student's last.
        samples: Numbers of sequences in the global batch, ascending.
        part: Which part of each sequence.
    """

    source: int
    destination: int
    samples: tuple[int, ...]
    part: int


def split_batch(samples: int, replicas: int) -> list[range]:
    """The sequences of a global batch that each of the teacher's replicas runs: as even as possible, in order."""
    edges = [samples * i // replicas for i in range(replicas + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def token_transfers(
    students: Sequence[RankCoordinates | None], teachers: Sequence[RankCoordinates | None], samples: int
) -> list[Transfer]:
    """The transfers of a step's tokens, which a replica's first rank reads, to the teacher's first stage; ordered.

    Args:
        students: The place of each rank in the student's layout.
        teachers: The place of each rank in the teacher's.
        samples: Sequences in the global batch, ordered by the student's replicas.
    """
    readers = {p.replica: rank for rank, p in enumerate(students) if p is not None and p[1:] == (0, 0, 0)}
    known = split_batch(samples, len(readers))
    runs = split_batch(samples, max(place.replica for place in teachers if place is not None) + 1)
    result = []
    for destination, place in enumerate(teachers):
        if place is None or place.stage:
            continue
        for replica, source in readers.items():
            if both := _both(runs[place.replica], known[replica]):
                result.append(Transfer(source, destination, both, 0))
    return sorted(result)


def state_transfers(
    students: Sequence[RankCoordinates | None], teachers: Sequence[RankCoordinates | None], samples: int
) -> list[Transfer]:
    """All transfers of a step's states, in the order of the sources, then of the destinations.

    Args:
        students: The place of each rank in the student's layout.
        teachers: The place of each rank in the teacher's.
        samples: Sequences in the global batch, ordered by the student's replicas.
    """
    learning, teaching = ({i: p for i, p in enumerate(places) if p is not None} for places in (students, teachers))
    last_stages = [max(place.stage for place in places.values()) for places in (learning, teaching)]
    ends: dict[int, list[int]] = {}  # of each of the teacher's replicas, the ranks that know its last states
    for rank, place in teaching.items():
        if place.stage == last_stages[1]:
            ends.setdefault(place.replica, []).append(rank)
    result = []
    wanted = split_batch(samples, max(place.replica for place in learning.values()) + 1)
    for destination, place in learning.items():
        if place.stage != last_stages[0]:
            continue
        for replica, run in enumerate(split_batch(samples, len(ends))):
            if both := _both(run, wanted[place.replica]):
                known = ends[replica]
                source = destination if destination in known else known[destination % len(known)]
                result.append(Transfer(source, destination, both, place.part))
    return sorted(result)


def _both(a: range, b: range) -> tuple[int, ...]:
    return tuple(range(max(a.start, b.start), min(a.stop, b.stop)))


def exchange(
    bridge: BridgeGroup,
    plan: Sequence[Transfer],
    states: dict[int, Float[Tensor, "s w"]],
    like: Float[Tensor, "l w"],
    parts: int,
) -> dict[int, Float[Tensor, "l w"]]:
    """Carry out a step's transfers, on all ranks.

    Args:
        bridge: The ranks.
        plan: All of them.
        states: Of each sequence that this rank has, what it hands on, whole.
        like: An empty tensor of the shape that arrives for one sequence.
        parts: The student's context-parallel size.

    Returns:
        Of each sequence that this rank needs, its part.
    """
    rank, group = bridge.rank, bridge.group
    arrived: dict[int, Tensor] = {}
    operations, waiting = [], []
    for transfer in plan:
        if rank not in (transfer.source, transfer.destination):
            continue
        if transfer.source == rank:
            whole = torch.stack([states[sample] for sample in transfer.samples], dim=1)
            sent = zigzag_split(whole, transfer.part, parts).contiguous()
            if transfer.destination == rank:
                arrived |= dict(zip(transfer.samples, sent.unbind(1), strict=True))
            else:
                operations.append(dist.P2POp(dist.isend, sent, transfer.destination, group))
        else:
            buffer = like.new_empty(like.shape[0], len(transfer.samples), like.shape[1])
            operations.append(dist.P2POp(dist.irecv, buffer, transfer.source, group))
            waiting.append((transfer.samples, buffer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for samples, buffer in waiting:
        arrived |= dict(zip(samples, buffer.unbind(1), strict=True))
    return arrived
