"""Importance of a mixture's experts and of their neurons, the same on every parallel layout.

- Expert: how much it adds to the tokens that are sent to it, `mean over tokens x sent to j of g_j(x) ||f_j(x)||_2` with
  the router's probability g and the expert's output f (REAP, "Router-weighted Expert Activation Pruning", arXiv
  2510.13999); 0 for an expert that no token is sent to.
- Neuron of an expert: the input of the expert's down projection, which Megatron multiplies by g. Tokens come to an
  expert from all samples and do not say from which: all that are sent to it count as one sequence, and are aggregated
  as a sequence of a dense MLP is. Wanda multiplies by the norms of the expert's columns, as for a dense MLP.

Shapes: t tokens of all local experts, expert after expert; e local experts, h hidden, f this rank's neurons of each.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.pruning import scores as names


class ExpertImportance:
    """Hooks on the experts of one mixture that this rank holds.

    Args:
        experts: Megatron's `TEGroupedMLP`.
        sums: Makes of one expert's neurons for some tokens (t, f) what is added up over all of them, (sums, f).
        weighted: Whether neurons are multiplied by the norms of their columns (Wanda).
    """

    def __init__(self, experts: Any, sums: Callable[[Tensor], Tensor], weighted: bool) -> None:
        self._experts, self._sums, self._weighted = experts, sums, weighted
        self._outputs: Tensor | None = None  # of each expert: tokens, and the sum of the norms
        self._neurons: Tensor | None = None
        self.handles: list[Any] = [
            experts.register_forward_hook(lambda _, args, output: self._see_outputs(output[0], args[1].tolist())),
            experts.linear_fc2.register_forward_pre_hook(lambda _, args: self._see_neurons(*args)),
        ]

    @torch.no_grad()
    def _see_outputs(self, output: Float[Tensor, "t h"], tokens: list[int]) -> None:
        weighted = output.float()  # by the router: the neurons are, and biases are added so
        if self._experts.tp_group.size() > 1:  # what the ranks add up to; the token dispatcher sums later
            weighted = weighted.clone()
            dist.all_reduce(weighted, group=self._experts.tp_group)
        sums = [norms.sum() for norms in weighted.norm(dim=-1).double().split(tokens)]
        seen = torch.stack([torch.tensor(tokens, dtype=torch.float64, device=output.device), torch.stack(sums)])
        self._outputs = seen if self._outputs is None else self._outputs + seen

    @torch.no_grad()
    def _see_neurons(self, neurons: Float[Tensor, "t f"], tokens: list[int]) -> None:
        seen = torch.stack([self._sums(own) for own in neurons.float().split(tokens)], dim=1)
        self._neurons = seen if self._neurons is None else self._neurons + seen

    def scores(self, group: Any, aggregate: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Of the local experts (e,) and their neurons (e, f), in float64. A collective of `group`.

        Args:
            group: The ranks that hold the same experts.
            aggregate: Makes a score of the sums (sums, e, f) and the number of tokens (e, 1).
        """
        assert self._outputs is not None
        assert self._neurons is not None
        for value in (self._outputs, self._neurons):
            dist.all_reduce(value, group=group)
        tokens, norms = self._outputs
        neurons = aggregate(self._neurons, tokens.clamp_min(1)[:, None])
        if self._weighted:
            weights = [getattr(self._experts.linear_fc2, f"weight{i}") for i in range(len(tokens))]
            neurons = neurons * torch.stack([weight.detach().double().square().sum(0).sqrt() for weight in weights])
        return norms / tokens.clamp_min(1), neurons


def gather(
    mixtures: Mapping[int, ExpertImportance], groups: Any, aggregate: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The scores of all experts of the model on rank 0, nothing elsewhere. A collective of all ranks.

    Args:
        mixtures: Those on this rank, by sub-layer.
        groups: Megatron's process groups.
        aggregate: See `ExpertImportance.scores`.
    """
    own = {i: [s.cpu() for s in mixture.scores(groups.expt_dp, aggregate)] for i, mixture in mixtures.items()}
    here = (groups.ep.rank(), groups.expt_tp.rank(), own) if groups.expt_dp.rank() == 0 else None
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, here)
    if dist.get_rank():
        return {}
    experts: dict[int, dict[int, Tensor]] = {}
    neurons: dict[int, dict[int, list[Tensor]]] = {}
    for ep, _, values in sorted((part for part in parts if part is not None), key=lambda part: part[:2]):
        for i, (expert, neuron) in values.items():
            experts.setdefault(i, {})[ep] = expert  # the same on all ranks that share it
            neurons.setdefault(i, {}).setdefault(ep, []).append(neuron)
    result = {names.expert(i): torch.cat(list(shards.values())) for i, shards in experts.items()}
    for i, shards in neurons.items():
        result[names.expert_ffn(i)] = torch.cat([torch.cat(columns, dim=1) for columns in shards.values()])
    return result
