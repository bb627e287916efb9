"""From scores to a plan: what stays on every axis."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_ext.errors import PlanError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan
from megatron_ext.pruning.plan import Plan, Provenance, differences
from megatron_ext.pruning.scores import Scores


def make_plan(
    scores: Scores, arch: Architecture, targets: Targets, *, scores_path: str | Path = "", merge_heads: bool = False
) -> Plan:
    """The plan that keeps the most important positions of every axis. Deterministic; of equal scores, the first stays.

    Depth: see `keep_units`. Width, per layer:

    - the neurons of the highest score;
    - the key/value groups whose query heads' scores have the largest L2 norm, then in each the heads of the highest;
    - for Mamba-2 the head channels of the highest `||s[:, d]||_2`, the SSM groups of the highest norm over their heads,
      and in each the heads of the highest `||s[h, D_top]||_2` (Minitron-SSM, arXiv 2504.11409) and the states of the
      highest score;
    - the experts of the highest score, in each its own neurons of the highest, and likewise in the shared expert.

    Sizes: as `budget.resolve` says. Those of `targets.per_layer` are then spread over the layers: each layer's scores
    are divided by their sum, and the most important slices of a divisor's width, over all layers, stay.

    Args:
        scores: The scores of `arch`.
        arch: The model to be cut.
        targets: What to cut it to.
        scores_path: Recorded in the provenance.
        merge_heads: Fold dropped query heads into those that stay (`merged_heads` of the plan).

    Raises:
        PlanError: The scores belong to another model or lack something, or the targets cannot be reached.
    """
    if wrong := differences(scores.architecture, arch):
        raise PlanError("the scores belong to another model", got=wrong)
    targets.check(arch)
    units = keep_units(scores, arch, targets)
    target = resolve(arch, targets, "".join(arch.pattern[i] for i in units))
    target = replace(target, attention_windows=arch.windows_of(units))
    if targets.per_layer:
        target = _spread(scores, arch, target, targets, units)

    hidden = None
    if target.hidden_size < arch.hidden_size:
        hidden = top(scores[names.HIDDEN], target.hidden_size)
    widths = _Widths()
    for place, i in enumerate(units):
        old, new = arch.at(i), target.at(place)
        if arch.pattern[i] == MLP and new.ffn_hidden_size < old.ffn_hidden_size:
            widths["ffn"][i] = top(scores[names.ffn(i)], new.ffn_hidden_size)
        elif arch.pattern[i] == ATTENTION:
            widths.cut_attention(i, scores, old, new, merge_heads)
        elif arch.pattern[i] == MAMBA:
            widths.cut_mamba(i, scores, old, new)
        elif arch.pattern[i] == MOE:
            widths.cut_experts(i, scores, old, new)
    return Plan(
        source=arch, target=target, units=units, hidden=hidden, **cast(dict[str, Any], widths),
        provenance=Provenance(
            model=scores.model, iteration=scores.iteration, fingerprint=scores.fingerprint, scores=str(scores_path),
            data=scores.data, seed=scores.seed, metric=scores.metric,
        ),
    )  # fmt: skip


class _Widths(defaultdict[str, dict[int, Any]]):
    """The per-layer fields of a plan by name, while they are found."""

    def __init__(self) -> None:
        super().__init__(dict)

    def cut_attention(self, i: int, scores: Scores, old: Architecture, new: Architecture, merge: bool) -> None:
        groups = None
        if new.num_query_groups < old.num_query_groups:
            per_group = scores[names.query_head(i)].view(old.num_query_groups, -1).norm(dim=1)
            groups = self["kv_groups"][i] = top(per_group, new.num_query_groups)
        staying = old.num_query_groups if groups is None else len(groups)
        if new.num_attention_heads < old.num_attention_heads // old.num_query_groups * staying:
            heads = scores[names.query_head(i)]
            self["query_heads"][i] = top(heads, new.num_attention_heads, old.num_query_groups, groups)
            if merge:
                self["merged_heads"][i] = _merged(heads, self["query_heads"][i], old.num_query_groups)

    def cut_mamba(self, i: int, scores: Scores, old: Architecture, new: Architecture) -> None:
        channels, groups = list(range(old.mamba_head_dim)), None
        if new.mamba_head_dim < old.mamba_head_dim:
            self["head_channels"][i] = top(scores[names.mamba(i)].norm(dim=0), new.mamba_head_dim)
            channels = list(self["head_channels"][i])
        if new.mamba_num_groups < old.mamba_num_groups:
            per_group = scores[names.mamba(i)][:, channels].reshape(old.mamba_num_groups, -1).norm(dim=1)
            groups = self["mamba_groups"][i] = top(per_group, new.mamba_num_groups)
        staying = old.mamba_num_groups if groups is None else len(groups)
        if new.mamba_num_heads < old.mamba_num_heads // old.mamba_num_groups * staying:
            heads = scores[names.mamba(i)][:, channels].norm(dim=1)
            self["mamba_heads"][i] = top(heads, new.mamba_num_heads, old.mamba_num_groups, groups)
        if new.mamba_state_dim < old.mamba_state_dim:
            states = scores[names.state(i)].flatten()
            self["states"][i] = top(states, new.mamba_state_dim * staying, old.mamba_num_groups, groups)

    def cut_experts(self, i: int, scores: Scores, old: Architecture, new: Architecture) -> None:
        experts = None
        if new.num_experts < old.num_experts:
            experts = self["experts"][i] = top(scores[names.expert(i)], new.num_experts)
        if new.moe_ffn_hidden_size < old.moe_ffn_hidden_size:
            neurons = scores[names.expert_ffn(i)].flatten()
            count = new.moe_ffn_hidden_size * new.num_experts
            self["expert_ffn"][i] = top(neurons, count, old.num_experts, experts)
        if new.moe_shared_expert_intermediate_size < old.moe_shared_expert_intermediate_size:
            self["shared_ffn"][i] = top(scores[names.shared_ffn(i)], new.moe_shared_expert_intermediate_size)


def keep_units(scores: Scores, arch: Architecture, targets: Targets) -> tuple[int, ...]:
    """The sub-layers that stay: those of the highest score, or all but the run that costs least (a scan).

    Args:
        scores: Those of `targets.depth_metric`.
        arch: The model.
        targets: Checked targets.

    Raises:
        PlanError: The scores lack the metric.
    """
    everything = range(len(arch.pattern))
    if targets.num_layers is not None:
        blocks = arch.layers.blocks
        kept = keep(scores, targets.depth_metric, len(blocks), targets.num_layers, blocks=True)
        return tuple(i for block in kept for i in blocks[block])
    if targets.num_sublayers is not None:
        return keep(scores, targets.depth_metric, len(arch.pattern), targets.num_sublayers)
    dropped: set[int] = set()
    for kind, count in targets.kinds(arch).items():
        units = arch.layers.indices(kind)
        if not count:
            dropped |= set(units)
        elif count < len(units):
            own = names.depth(targets.depth_metric, kind=kind)
            importance = scores[own] if own in scores.values else scores[names.depth(targets.depth_metric)][units]
            dropped |= set(units) - {units[place] for place in top(importance, count)}
    return tuple(i for i in everything if i not in dropped)


def keep(scores: Scores, metric: str, size: int, count: int, *, blocks: bool = False) -> tuple[int, ...]:
    """Of `size` sub-layers, or blocks, the `count` that stay by a metric of `DEPTH_METRICS`.

    Raises:
        PlanError: It tells none from another.
    """
    if count == size:
        return tuple(range(size))
    if isinstance(DEPTH_METRICS[metric], Scan):
        run = size - count
        lost = scores[names.scan(metric, run, blocks=blocks)]
        if len(lost) > 1 and lost.min() == lost.max():
            raise PlanError(
                f"{metric} tells no run from another", got=f"each of them costs {float(lost[0]):.4g}",
                legal="a task that the model is better at, or another --prune-depth-metric",
            )  # fmt: skip
        first = int(lost.argmin())
        return tuple(i for i in range(size) if not first <= i < first + run)
    return top(scores[names.depth(metric, blocks=blocks)], count)


def top(scores: Tensor, keep: int, groups: int = 1, kept_groups: Sequence[int] | None = None) -> tuple[int, ...]:
    """Ascending indices of the `keep` highest scores, the same number from each of `groups` equal runs of positions.

    Args:
        scores: `(positions,)`.
        keep: How many stay, over all groups.
        groups: How many groups the positions lie in.
        kept_groups: The groups that stay; all by default.
    """
    grouped = scores.view(groups, -1)
    chosen = list(range(groups) if kept_groups is None else kept_groups)
    if not keep:
        return ()
    order = torch.argsort(grouped[chosen], dim=1, descending=True, stable=True)[:, : keep // len(chosen)]
    first = torch.tensor(chosen)[:, None] * grouped.shape[1]
    return tuple((order.sort(dim=1).values + first).flatten().tolist())


def _merged(scores: Tensor, kept: Sequence[int], groups: int) -> tuple[tuple[int, int], ...]:
    """Which dropped query head is folded into which kept one, in each group of L heads, K of them kept.

    With heads ranked from the most important, 1 to L, head `i` takes in head `2K - i + 1`, for `i` from `2K - L + 1` to
    K (Minitron, arXiv 2407.14679): the last that stays takes the first that goes, and so on outwards.
    """
    pairs = []
    per_group = scores.numel() // groups
    for group in dict.fromkeys(head // per_group for head in kept):
        members = torch.arange(group * per_group, (group + 1) * per_group)
        ranked = members[torch.argsort(scores[members], descending=True, stable=True)].tolist()
        count = sum(head // per_group == group for head in kept)
        pairs += [(ranked[i], ranked[2 * count - 1 - i]) for i in range(max(0, 2 * count - per_group), count)]
    return tuple(sorted(pairs))


def _spread(
    scores: Scores, arch: Architecture, target: Architecture, targets: Targets, units: Sequence[int]
) -> Architecture:
    """`target` with the sizes of `targets.per_layer` shared out over the layers, their sums unchanged or just below."""
    uneven = {}
    for name in targets.per_layer:
        divisor = targets.divisor(arch, name)
        layers = [i for i in units if arch.pattern[i] == (MLP if name == "ffn_hidden_size" else MAMBA)]
        slices = []  # of each layer, its most important first
        for i in layers:
            if name == "ffn_hidden_size":
                values = scores[names.ffn(i)].view(1, -1)
            else:
                values = scores[names.mamba(i)].norm(dim=1).view(arch.mamba_num_groups, -1)
                values = values[list(top(values.norm(dim=1), target.mamba_num_groups))]
            width = divisor // values.shape[0]
            ranked = values.sort(dim=1, descending=True).values
            whole = ranked[:, : ranked.shape[1] // width * width]
            share = values.sum().clamp_min(torch.finfo(values.dtype).tiny)  # a layer that never did anything has none
            slices.append(whole.unflatten(1, (-1, width)).sum(dim=(0, 2)) / share)
        total = getattr(target, name) * len(layers) // divisor
        if total < len(layers):
            raise PlanError(f"{name} is too small to spread", got=getattr(target, name), legal=f"at least {divisor}")
        # The best slice of every layer stays, so that none is empty; then the best of the others.
        counts = [1] * len(layers)
        others = [(-float(value), place) for place, own in enumerate(slices) for value in own[1:]]
        for _, place in sorted(others)[: total - len(layers)]:
            counts[place] += 1
        uneven[name] = tuple(count * divisor for count in counts)
    return replace(target, layer_sizes=uneven)
