"""Random weights and scores of any architecture."""

import torch
from torch import Tensor

from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.pruning.scores import Scores, shapes


def random_scores(arch: Architecture, **changes: Tensor) -> Scores:
    """Scores drawn evenly from 0 to 1, but for `changes`."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes(arch).items()}
    return Scores(values=values | changes, architecture=arch, model="run", iteration=3, seed=5)


def random_weights(arch: Architecture, seed: int = 7) -> dict[str, Tensor]:
    """Float64 weights by key, of a size at which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in axes.tensors(arch).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[key] = noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * noise
    return weights
