"""Maps between states of different widths: on the stage where a pair meets, under its name, and remembered."""

import torch

from megatron_ext.distillation.intermediate_layers import PipelineRouting, parse
from megatron_ext.distillation.projections import Projections
from megatron_ext.models.pattern import parse as parse_pattern

PAIRS = parse(["embedding", "norm1:norm3", "3:5"], parse_pattern("M-*-"), parse_pattern("M-*-M-"))


def routing(student: int, teacher: int) -> PipelineRouting:
    return PipelineRouting(PAIRS, (student, teacher), (2, 2), (3, 3))


def test_each_stage_has_the_maps_of_its_pairs() -> None:
    stages = [Projections(routing(4, 6), stage, seed=5) for stage in (0, 1)]
    names = [[name for name, _ in stage.named_parameters()] for stage in stages]
    assert names == [["states-embedding-embedding"], ["states-norm1-norm3", "states-3-5"]]
    state = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    weight = stages[1].get_parameter("states-3-5")
    assert weight.shape == (6, 4)
    torch.testing.assert_close(stages[1](2, state), torch.einsum("sbh,kh->sbk", state, weight))
    assert stages[1](2, state.bfloat16()).dtype == torch.bfloat16
    assert stages[1](0, state) is state, "a pair that meets elsewhere"


def test_first_weights_do_not_depend_on_the_layout() -> None:
    alone = PipelineRouting(PAIRS, (4, 6), (4,), (6,))
    whole = dict(Projections(alone, 0, seed=5).named_parameters())
    split = {name: value for i in (0, 1) for name, value in Projections(routing(4, 6), i, seed=5).named_parameters()}
    assert whole.keys() == split.keys()
    assert all(torch.equal(value, whole[name]) for name, value in split.items())


def test_states_of_one_width_need_no_map() -> None:
    own = Projections(routing(4, 4), 1, seed=5)
    assert not list(own.parameters())
    own.balance.alpha = 0.375
    other = Projections(routing(4, 4), 1, seed=5)
    other.load_state_dict(own.state_dict())
    assert other.balance.alpha == 0.375
