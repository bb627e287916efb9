"""From scores to a plan: what stays on every axis."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import PlanError
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.plan import Plan, Provenance, differences
from megatron_ext.pruning.scores import Scores


def make_plan(scores: Scores, arch: Architecture, targets: Targets, *, scores_path: str | Path = "") -> Plan:
    """The plan that keeps the most important positions of every axis. Deterministic; of equal scores, the first stays.

    Depth: blocks of the highest influence stay (Block Influence, arXiv 2407.14679). Width, per layer:
    the neurons of the highest score; the query heads of the highest score within each key/value group; for Mamba-2
    the head channels of the highest `||s[:, d]||_2`, then within each SSM group the heads of the highest
    `||s[h, D_top]||_2` (Minitron-SSM, arXiv 2504.11409). Sizes: as `budget.resolve` says.

    Args:
        scores: The scores of `arch`.
        arch: The model to be cut.
        targets: What to cut it to.
        scores_path: Recorded in the provenance.

    Raises:
        PlanError: The scores belong to another model or lack something, or the targets cannot be reached.
    """
    if wrong := differences(scores.architecture, arch):
        raise PlanError("the scores belong to another model", got=wrong)
    targets.check(arch)
    units = tuple(range(len(arch.pattern)))
    if targets.num_layers is not None and targets.num_layers < len(arch.layers.blocks):
        blocks = top(scores[names.BLOCK_INFLUENCE], targets.num_layers)
        units = tuple(i for block in blocks for i in arch.layers.blocks[block])
    target = resolve(arch, targets, "".join(arch.pattern[i] for i in units))

    hidden, ffn, query_heads, mamba_heads, head_channels = None, {}, {}, {}, {}
    if target.hidden_size < arch.hidden_size:
        hidden = top(scores[names.HIDDEN], target.hidden_size)
    for i in units:
        kind = arch.pattern[i]
        if kind == MLP and target.ffn_hidden_size < arch.ffn_hidden_size:
            ffn[i] = top(scores[names.ffn(i)], target.ffn_hidden_size)
        elif kind == ATTENTION and target.num_attention_heads < arch.num_attention_heads:
            query_heads[i] = top(scores[names.query_head(i)], target.num_attention_heads, arch.num_query_groups)
        elif kind == MAMBA:
            channels = range(arch.mamba_head_dim)
            if target.mamba_head_dim < arch.mamba_head_dim:
                channels = head_channels[i] = top(scores[names.mamba(i)].norm(dim=0), target.mamba_head_dim)
            if target.mamba_num_heads < arch.mamba_num_heads:
                head_scores = scores[names.mamba(i)][:, list(channels)].norm(dim=1)
                mamba_heads[i] = top(head_scores, target.mamba_num_heads, arch.mamba_num_groups)
    return Plan(
        source=arch, target=target, units=units, hidden=hidden, ffn=ffn, query_heads=query_heads,
        mamba_heads=mamba_heads, head_channels=head_channels,
        provenance=Provenance(
            model=scores.model, iteration=scores.iteration, fingerprint=scores.fingerprint, scores=str(scores_path),
            data=scores.data, seed=scores.seed, metric=scores.metric,
        ),
    )  # fmt: skip


def top(scores: Tensor, keep: int, groups: int = 1) -> tuple[int, ...]:
    """Ascending indices of the `keep` highest scores, the same number from each of `groups` equal runs of positions."""
    grouped = scores.view(groups, -1)
    order = torch.argsort(grouped, dim=1, descending=True, stable=True)[:, : keep // groups].sort(dim=1).values
    return tuple((order + torch.arange(groups)[:, None] * grouped.shape[1]).flatten().tolist())
