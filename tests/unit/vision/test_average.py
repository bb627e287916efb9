"""The moving average of weights: its arithmetic, its precision, and what it makes of images."""

import copy
from dataclasses import replace

import torch
from vision_oracle import SMALL

from megatron_ext.vision.average import WeightAverage
from megatron_ext.vision.network import Network


def test_it_is_the_weighted_sum_of_the_weights_of_each_step() -> None:
    """The first weights are the average; a step is taken in once, however often it is told; images see the average."""
    network = Network(SMALL).eval()
    average = WeightAverage(network, 0.75)
    weights = []
    for step in range(4):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        weights.append(copy.deepcopy(network.state_dict()))
        for _ in range(2):
            average.update(step)
    expected = {
        name: (27 * weights[0][name] + 9 * weights[1][name] + 12 * weights[2][name] + 16 * weights[3][name]) / 64
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    other = Network(SMALL).eval()
    other.load_state_dict(network.state_dict() | expected)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(average(images), other(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(average(images), network(images))


def test_amid_training_it_looks_as_in_evaluation() -> None:
    """With its own statistics, no branch left out, no gradient; and training goes on as if nothing had been."""
    model = replace(SMALL, drop_path=0.5)
    network = Network(model)
    average = WeightAverage(network, 0.75)
    images = torch.randn(2, 3, 64, 64)
    expected = copy.deepcopy(network).eval()(images)
    network(images)  # statistics move
    network.stages[2].eval()  # as one that is frozen
    before, modes = copy.deepcopy(average.state_dict()), [module.training for module in network.modules()]
    state = torch.get_rng_state()
    found = average(images)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_saved_average_goes_on() -> None:
    network = Network(SMALL)
    first, second = WeightAverage(network, 0.75), WeightAverage(network, 0.75)
    first.update(3)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        network.head.weight.add_(1.0)
    for average in (first, second):
        average.update(4)
    assert torch.equal(first.get_buffer("head/weight"), second.get_buffer("head/weight"))


def test_it_stays_float32() -> None:
    """In 16 bits a decay of .9998 would add nothing."""
    network = Network(SMALL).bfloat16()
    average: WeightAverage = WeightAverage(network, 0.9998).bfloat16()
    assert {value.dtype for value in average.buffers()} == {torch.float32, torch.int64}
    average.update(0)
    before = {name: value.clone() for name, value in average.named_buffers()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    average.update(1)
    moved = average.get_buffer("head/weight") - before["head/weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-4), rtol=0.02, atol=0)
