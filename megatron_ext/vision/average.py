"""The moving average of a network's weights (Polyak and Juditsky, 1992), which is measured and saved beside it.

Step by step it becomes decay x average + (1 - decay) x weights, in float32; batch norm's statistics are averaged, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class WeightAverage(nn.Module):
    """The average of a network's weights, split over ranks as they are.

    Args:
        network: Its weights are looked at when it is updated; it is not a part of this module.
        decay: How much of the average a step leaves.
    """

    step: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self._network, self._decay = [network], decay  # a list, so that it is not registered
        self._taken = -1  # what `step` says: asking a GPU would wait for it
        for name, value in _floats(network).items():
            self.register_buffer(buffer_name(name), value.detach().float().clone())
        self.register_buffer("step", torch.tensor(-1))

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightAverage":
        """Move it, and leave it float32."""
        super()._apply(fn, recurse)
        for name, value in self.named_buffers():
            setattr(self, name, value.float() if value.is_floating_point() else value)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint's average."""
        super()._load_from_state_dict(*args, **kwargs)
        self._taken = int(self.step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after so many steps, once; the first ones are the average.

        Args:
            step: Steps that the weights have behind them.
        """
        if self._taken == step:
            return
        share = 1.0 if self._taken < 0 else 1 - self._decay
        for name, value in _floats(self._network[0]).items():
            self.get_buffer(buffer_name(name)).lerp_(value.float(), share)
        self.step.fill_(step)
        self._taken = step

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """What the network makes of images with the averaged weights, in evaluation mode, also amid training."""
        network = self._network[0]
        own = {name: self.get_buffer(buffer_name(name)).to(value.dtype) for name, value in _floats(network).items()}
        modes = {module: module.training for module in network.modules()}
        try:
            return functional_call(network.eval(), own, (images,))
        finally:
            for module, training in modes.items():
                module.training = training


def buffer_name(name: str) -> str:
    """Of a weight's average: torch has no dots in names of buffers."""
    return name.replace(".", "/")


def _floats(network: nn.Module) -> dict[str, Tensor]:
    named = (*network.named_parameters(), *network.named_buffers())  # not its state, to which Megatron adds others
    return {name: value for name, value in named if value.is_floating_point()}
