"""Each sequence goes from a rank that has run it to each rank that needs it, once."""

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.distillation.teachers.exchange import (
    RankCoordinates,
    split_batch,
    state_transfers,
    token_transfers,
)


def places(replicas: int, parts: int, shards: int, stages: int) -> list[RankCoordinates]:
    """Megatron's order of ranks: tensor, context, data, pipeline."""
    return [
        RankCoordinates(replica, part, shard, stage)
        for stage in range(stages)
        for replica in range(replicas)
        for part in range(parts)
        for shard in range(shards)
    ]


LAYOUTS = [sizes for sizes in product([1, 2, 4], repeat=4) if prod(sizes) == 16]
TEACHERS = [sizes for sizes in LAYOUTS if sizes[1] == 1]


@given(
    student=st.sampled_from(LAYOUTS),
    teacher=st.sampled_from(TEACHERS),
    per_replica=st.integers(1, 5),
    apart=st.booleans(),
)
def test_everyone_gets_what_it_needs(
    student: tuple[int, ...], teacher: tuple[int, ...], per_replica: int, apart: bool
) -> None:
    """Whether the teacher is on the student's ranks or on others."""
    samples = per_replica * student[0]
    students: list[RankCoordinates | None] = list(places(*student))
    teachers: list[RankCoordinates | None] = list(places(*teacher))
    if apart:
        students, teachers = [*students, *[None] * 16], [*[None] * 16, *teachers]
    plan = state_transfers(students, teachers, samples)
    assert len({(t.source, t.destination) for t in plan}) == len(plan)  # one message for two ranks
    runs = split_batch(samples, teacher[0])
    for rank, place in enumerate(students):
        if place is None:
            assert all(t.destination != rank for t in plan)
            continue
        got = sorted(sample for t in plan if t.destination == rank for sample in t.samples)
        last = place.stage == student[3] - 1
        assert got == ([place.replica * per_replica + i for i in range(per_replica)] if last else [])
    asked = token_transfers(students, teachers, samples)
    for rank, place in enumerate(teachers):
        got = sorted(sample for t in asked if t.destination == rank for sample in t.samples)
        assert got == (list(runs[place.replica]) if place is not None and place.stage == 0 else [])
    for t in asked:
        reader = students[t.source]
        assert reader is not None
        assert reader[1:] == (0, 0, 0)
        assert {sample // per_replica for sample in t.samples} == {reader.replica}
    for t in plan:
        source, destination = teachers[t.source], students[t.destination]
        assert source is not None
        assert destination is not None
        assert source.stage == teacher[3] - 1
        assert set(t.samples) <= set(runs[source.replica])
        assert t.part == destination.part


@pytest.mark.parametrize(("samples", "replicas"), [(8, 2), (7, 3), (2, 4)])
def test_the_teachers_replicas_share_evenly(samples: int, replicas: int) -> None:
    runs = split_batch(samples, replicas)
    assert [i for run in runs for i in run] == list(range(samples))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
