"""Which states are paired, where they meet, and that they arrive as they were sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.distillation.intermediate_layers import (
    LayerOutput,
    LayerPair,
    MessagePart,
    PipelineRouting,
    join_bf16,
    pack,
    parse,
    split_bf16,
    unpack,
)
from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import parse as parse_pattern

STUDENT, TEACHER = parse_pattern("M-*-"), parse_pattern("M-*-M-*-M-")


def words(*given: str) -> list[str]:
    return [str(pair) for pair in parse(given, STUDENT, TEACHER)]


def test_pairs_are_written_out_or_by_kind() -> None:
    assert words("embedding", "final:3", "norm1:norm9") == ["embedding:embedding", "final:3", "norm1:norm9"]
    assert words("2") == ["2:2"]
    assert words("-") == ["1:5", "3:9"]  # of five MLPs the third and the last
    assert words("norm*") == ["norm2:norm6"]
    assert words("all") == ["0:2", "1:4", "2:7", "3:9"]


def test_the_last_meets_the_last_of_fewer_too() -> None:
    assert [str(pair) for pair in parse(["-"], TEACHER, STUDENT)] == ["1:1", "3:1", "5:3", "7:3", "9:3"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("4", "no such sub-layer"),
        ("3:10", "no such sub-layer"),
        ("1:2:3", "no pair of states"),
        ("last", "no pair of states"),
        ("normal", "no pair of states"),
        ("E", "not both models have"),
    ],
)
def test_what_is_no_pair_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        words(word)
    with pytest.raises(ConfigError, match="named twice"):
        words("2", "*", "2:2")


def test_a_linear_sublayer_has_no_norm() -> None:
    """What goes into it, and comes out of it, is the stream."""
    linear = parse_pattern("M-L*")
    assert [str(pair) for pair in parse(["2:3"], linear, TEACHER)] == ["2:3"]
    for word in ("norm2:norm3", "normL", "normall"):
        with pytest.raises(ConfigError, match="has no norm"):
            parse([word], linear, linear)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5),
    data=st.data(),
)
def test_each_pair_meets_once_and_both_states_are_there(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Followed from stage to stage: what leaves one has come to be on it, or has arrived."""
    student, teacher = zip(*sizes, strict=True)

    def point(layers: int) -> st.SearchStrategy[LayerOutput]:
        numbered = st.builds(LayerOutput, st.sampled_from(["after", "norm"]), st.integers(0, layers - 1))
        return st.one_of(numbered, st.sampled_from([LayerOutput("embedding"), LayerOutput("final")]))

    pairs = data.draw(st.lists(st.builds(LayerPair, point(sum(student)), point(sum(teacher))), unique=True, max_size=6))
    on_last = data.draw(st.booleans())
    route = PipelineRouting(tuple(pairs), (8, 16), student, None if on_last else teacher)
    known: set[str] = set()
    met: list[int] = []
    for stage in range(route.stages):
        known |= {"student", *([] if on_last else ["teacher"])}
        known |= {f"{side} {point}" for side in ("student", "teacher") for point in route.points(stage, side)}
        for i in route.meeting(stage):
            assert {f"student {pairs[i].student}", f"teacher {pairs[i].teacher}"} <= known
            met.append(i)
            known.add(f"distance {i}")
        leaving = [part.name for part in route.leaving(stage, torch.float32)]
        assert set(leaving) <= known
        assert len(leaving) == len(set(leaving))
        known = set(leaving)
    assert sorted(met) == list(range(len(pairs)))
    assert {f"distance {i}" for i in met} <= known


def test_parts_travel_side_by_side_and_only_trained_ones_have_gradients() -> None:
    parts = [MessagePart("student", 3, True), MessagePart("teacher", 2, False)]
    tensors = {part.name: torch.randn(4, 2, part.width, requires_grad=True) for part in parts}
    arrived = unpack(parts, pack(parts, tensors))
    for name, value in tensors.items():
        assert torch.equal(arrived[name], value)
    (arrived["student"].sum() * 2).backward()
    assert torch.equal(tensors["student"].grad, torch.full((4, 2, 3), 2.0))  # type: ignore[arg-type]
    assert not arrived["teacher"].requires_grad
    assert not tensors["teacher"].grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_travels_in_any_type_without_loss_of_digits(dtype: torch.dtype) -> None:
    """Both ways: forward the value, backward its gradient."""
    generator = torch.Generator().manual_seed(3)
    value = torch.rand(5, 2, generator=generator).requires_grad_()
    arrived = join_bf16(split_bf16(value, dtype))
    assert torch.equal(arrived, value)
    gradient = torch.rand(5, 2, generator=generator)
    arrived.backward(gradient)
    assert torch.equal(value.grad, gradient)  # type: ignore[arg-type]
