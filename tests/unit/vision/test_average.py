"""The moving average of weights: its arithmetic, its precision, and what it makes of images."""

import copy

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
