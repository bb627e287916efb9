"""Width importance, measured by hooks in one forward pass, the same on every parallel layout.

An activation is aggregated over the sequence, then over the calibration samples, each by the mean of its magnitude, by
its L2 norm, by its variance (Minitron, arXiv 2407.14679) or by whatever else is in `aggregations.AGGREGATIONS`:

- hidden channel: the output of each sub-layer's pre-norm, summed over sub-layers;
- FFN neuron: the input of the down projection;
- query head: the L2 norm of the head's output, before the output projection;
- Mamba-2 head and head channel: the `x` part of the input projection (Minitron-SSM, arXiv 2504.11409);
- Mamba-2 state: the product of the aggregated `B` and `C` parts, whose products are what the state contributes;
- experts and their neurons: `megatron_ext.pruning.expert_importance`; a shared expert is scored like any MLP.

Wanda's weight times activation (arXiv 2306.11695) is the baseline beside it: L2 norms over all tokens of the inputs of
a projection, times the L2 norms of its columns; for Mamba-2 those of the output projection, for the hidden channels of
a mixture those of the router, all experts and the shared expert together.

Shapes: s sequence (this rank's part), b micro-batch, h hidden, f FFN, n heads, d channels; n and f are this rank's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.hooks import FUSED_NORM, pre_norm
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE
from megatron_ext.pruning import expert_importance
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.activations import Activations, WidthMetric

# Of each kind of sub-layer, the projection whose output it adds.
_LAST = {MAMBA: "mixer.out_proj", ATTENTION: "self_attention.linear_proj", MLP: "mlp.linear_fc2"}


class Importance(Activations):
    """Hooks on the chunks of one rank that accumulate scores while calibration data runs through the model.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped.
        architecture: The whole model.
        metric: How activations are aggregated.
    """

    def __init__(self, chunks: Iterable[Any], architecture: Architecture, metric: WidthMetric | None = None) -> None:
        super().__init__(metric or WidthMetric())
        self.architecture = architecture
        self._columns: dict[str, Tensor] = {}  # squared norms of the columns that activations are multiplied by
        self._mixtures: dict[int, expert_importance.ExpertImportance] = {}
        for chunk in chunks:
            self._groups = chunk.pg_collection
            self._config = chunk.config
            if len(chunk.decoder.layers):
                self._handles.append(chunk.decoder.layers[0].register_forward_pre_hook(self._count, with_kwargs=True))
                self._first = chunk.decoder.layers[0].layer_number
            for layer in chunk.decoder.layers:
                self._watch(layer, layer.layer_number - 1)

    def _watch(self, layer: torch.nn.Module, index: int) -> None:
        kind, own = self.architecture.pattern[index], self.architecture.at(index)
        if kind == LINEAR:  # it has no norm, whose output says what a channel is worth, and no axis of its own
            return
        if kind == MOE:
            self._watch_mixture(layer, index)
            return
        wanda = self.metric.kind == "wanda"
        first, last = layer.get_submodule(FUSED_NORM[kind]), layer.get_submodule(_LAST[kind])
        # Under sequence parallelism each tensor rank holds a part of the sequence.
        hidden = f"{names.HIDDEN}.{index}"
        self._before(
            first, lambda x: self._add(hidden, pre_norm(first, x, self._config), split=self._config.sequence_parallel)
        )
        if wanda:
            self._columns[hidden] = _columns(first, self._groups.tp)  # the rows are split over the tensor ranks
        if kind == MLP:
            self._before(last, lambda x: self._add(names.ffn(index), x.float()), names.ffn(index))
        elif kind == ATTENTION:
            heads = names.query_head(index)

            def see(x: Tensor) -> None:
                per_head = x.float().unflatten(-1, (-1, own.kv_channels))
                self._add(heads, per_head if wanda else per_head.norm(dim=-1))

            self._before(last, see, heads)
        elif kind == MAMBA:
            shape = (-1, own.mamba_head_dim)
            if wanda:
                name = names.mamba(index)
                self._before(last, lambda x: self._add(name, x.float().unflatten(-1, shape)), name)
            self._handles.append(first.register_forward_hook(self._mamba(layer.get_submodule("mixer"), index)))

    def _watch_mixture(self, layer: Any, index: int) -> None:
        hidden, wanda, mixture = f"{names.HIDDEN}.{index}", self.metric.kind == "wanda", layer.mlp
        split = self._config.sequence_parallel
        see = layer.pre_mlp_layernorm.register_forward_hook(lambda _, __, x: self._add(hidden, x.float(), split=split))
        self._mixtures[index] = expert_importance.ExpertImportance(mixture.experts, self._sequence.sums, wanda)
        self._handles += [see, *self._mixtures[index].handles]
        if wanda:
            squares = mixture.router.weight.detach().double().square().sum(dim=0)
            first = mixture.experts.linear_fc1
            each = [getattr(first, f"weight{i}").detach().double().square().sum(0) for i in range(first.num_gemms)]
            routed = torch.stack(each).sum(dim=0)
            for group in (self._groups.ep, self._groups.expt_tp):
                dist.all_reduce(routed, group=group)
            self._columns[hidden] = squares + routed
        if mixture.shared_experts is not None:
            shared, name = mixture.shared_experts, names.shared_ffn(index)
            self._before(shared.linear_fc2, lambda x: self._add(name, x.float()), name)
            if wanda:
                self._columns[hidden] += _columns(shared.linear_fc1, self._groups.tp)

    def _before(self, module: torch.nn.Module, see: Callable[[Tensor], None], weighs: str = "") -> None:
        """Show what goes into a module; `weighs` names the score that Wanda multiplies by its columns."""
        self._handles.append(module.register_forward_pre_hook(lambda _, args: see(args[0])))
        if weighs and self.metric.kind == "wanda":
            self._columns[weighs] = _columns(module)

    def _mamba(self, mixer: Any, index: int) -> Callable[..., None]:
        own = self.architecture.at(index)
        inner, state = mixer.d_inner_local_tp, mixer.ngroups_local_tp * mixer.d_state

        def see(_: Any, __: Any, output: Any) -> None:
            projected = output[0] if isinstance(output, tuple) else output  # s b (z x B C dt)
            _, x, B, C, _ = projected.split([inner, inner, state, state, mixer.nheads_local_tp], dim=-1)
            if self.metric.kind == "activation":
                self._add(names.mamba(index), x.float().unflatten(-1, (-1, own.mamba_head_dim)))
            for part, value in (("B", B), ("C", C)):
                self._add(f"{names.state(index)}.{part}", value.float().unflatten(-1, (-1, own.mamba_state_dim)))

        return see

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.layer_number == self._first:  # of virtual pipeline chunks, the last one built
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._samples += hidden.shape[1]

    def _apart(self) -> dict[str, Tensor]:
        """Of the experts. A collective of all ranks."""
        if MOE not in self.architecture.pattern:
            return {}
        return expert_importance.gather(self._mixtures, self._groups, self._sequence.value)

    def _score(self, name: str, samples: float) -> Tensor:
        score = super()._score(name, samples)
        if name in self._columns:
            score = score * self._columns[name].sqrt().view(score.shape)
            if "query_head" in name:
                score = score.norm(dim=-1)
        return score

    def _assemble(self, merged: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        units = [i for i, kind in enumerate(self.architecture.pattern) if kind != LINEAR]
        result = {names.HIDDEN: torch.stack([merged.pop(f"{names.HIDDEN}.{i}")[0] for i in units]).sum(0)}
        for i in self.architecture.layers.indices(MAMBA):
            B, C = (torch.cat(merged.pop(f"{names.state(i)}.{part}")) for part in "BC")
            result[names.state(i)] = B * C
        return result | {name: torch.cat(shards) for name, shards in merged.items()}


def _columns(linear: Any, group: Any = None) -> Tensor:
    """The squared L2 norms of a weight's columns, whose rows may be split over `group`."""
    squares = linear.weight.detach().double().square().sum(dim=0)
    if group is not None and group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares
