"""The plan: what is kept of a model. A value that can be written by hand, diffed, replayed, and applied anywhere."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.errors import ConfigError, PlanError
from megatron_ext.models.axes import Kept
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.scores import Scores

FORMAT = "megatron_ext.plan/1"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a plan comes from; all of it optional, for a plan written by hand.

    Attributes:
        model: Checkpoint directory of the model that is cut.
        iteration: Its training step.
        fingerprint: Its checkpoint's fingerprint (`megatron_ext.checkpoint.layout`).
        scores: The score file.
        data: The calibration data.
        seed: The seed that chose the calibration samples.
        metric: The importance metric.
    """

    model: str = ""
    iteration: int = 0
    fingerprint: str = ""
    scores: str = ""
    data: str = ""
    seed: int = 0
    metric: str = ""


# (field of Plan, kind of sub-layer, size in Architecture, number of groups that must stay equal)
_PER_LAYER = (
    ("ffn", MLP, "ffn_hidden_size", None),
    ("query_heads", ATTENTION, "num_attention_heads", "num_query_groups"),
    ("mamba_heads", MAMBA, "mamba_num_heads", "mamba_num_groups"),
    ("head_channels", MAMBA, "mamba_head_dim", None),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is kept of the model `source`, which makes it the model `target`.

    All indices count positions of the source, ascending. Per-layer entries are keyed by the sub-layer's index in the
    source; an absent one keeps everything, as does `hidden=None`.

    Attributes:
        units: Sub-layers that stay.
        hidden: Channels of the residual stream that stay.
        ffn: MLP neurons.
        query_heads: Query heads, numbered over all groups; each group keeps the same number.
        mamba_heads: Mamba-2 heads, numbered over all SSM groups; each group keeps the same number.
        head_channels: Channels within a Mamba-2 head, the same for all heads of a layer.

    Raises:
        PlanError: Indices are out of order or range, groups become unequal, or the result is not `target`.
    """

    source: Architecture
    target: Architecture
    units: tuple[int, ...]
    hidden: tuple[int, ...] | None = None
    ffn: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    query_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mamba_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    head_channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        source, target = self.source, self.target
        _check_indices("units", self.units, len(source.pattern))
        result: dict[str, Any] = {"pattern": "".join(source.pattern[i] for i in self.units)}
        if self.hidden is not None:
            _check_indices("hidden", self.hidden, source.hidden_size)
            result["hidden_size"] = len(self.hidden)
        for axis, kind, size, groups in _PER_LAYER:
            entries: Mapping[int, tuple[int, ...]] = getattr(self, axis)
            for layer, kept in entries.items():
                if layer not in self.units or source.pattern[layer] != kind:
                    raise PlanError(f"{axis} of sub-layer {layer}: it is not kept, or has no such axis")
                _check_indices(f"{axis} of sub-layer {layer}", kept, getattr(source, size))
                if groups is not None:
                    _check_groups(f"{axis} of sub-layer {layer}", kept, getattr(source, size), getattr(source, groups))
            layers = [i for i in self.units if source.pattern[i] == kind]
            kept_sizes = {len(entries[i]) if i in entries else getattr(source, size) for i in layers}
            if len(kept_sizes) > 1:
                raise PlanError(f"{axis}: layers keep different numbers", got=sorted(kept_sizes), legal="one number")
            result[size] = kept_sizes.pop() if kept_sizes else getattr(target, size)
        if wrong := _differences(replace(source, **result), target):
            raise PlanError(
                "what is kept does not make the target", got=wrong, legal="; ".join(map(str, result.items()))
            )

    @classmethod
    def keep_everything(cls, arch: Architecture) -> Self:
        """The plan that changes nothing."""
        return cls(source=arch, target=arch, units=tuple(range(len(arch.pattern))))

    def kept(self, layer: int | None = None) -> Kept:
        """What is kept of a sub-layer of the source; of the model's own weights for `None`."""
        if layer is None:
            return Kept(hidden=self.hidden)
        return Kept(hidden=self.hidden, **{axis: getattr(self, axis).get(layer) for axis, *_ in _PER_LAYER})

    def check(self, arch: Architecture) -> None:
        """Check that this plan was made for `arch`.

        Raises:
            PlanError: Names every difference.
        """
        if wrong := _differences(self.source, arch):
            raise PlanError("the plan belongs to another model", got=wrong)

    @property
    def fingerprint(self) -> str:
        """A hash of what is cut, whatever the provenance: 16 hexadecimal digits."""
        content = self.to_dict()
        content.pop("provenance")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; the inverse of `from_dict`."""
        per_layer = {
            axis: {str(layer): list(kept) for layer, kept in sorted(getattr(self, axis).items())}
            for axis, *_ in _PER_LAYER
        }
        return {
            "format": FORMAT,
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "provenance": asdict(self.provenance),
            "units": list(self.units),
            "hidden": None if self.hidden is None else list(self.hidden),
            **per_layer,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From `to_dict`'s values.

        Raises:
            PlanError: They are not a plan, or not a valid one.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise PlanError("this is not a plan", legal=f'JSON with "format": "{FORMAT}"')
        try:
            hidden = values["hidden"]
            return cls(
                source=Architecture.from_dict(values["source"]),
                target=Architecture.from_dict(values["target"]),
                units=tuple(values["units"]),
                hidden=None if hidden is None else tuple(hidden),
                provenance=Provenance(**values["provenance"]),
                **{axis: {int(i): tuple(kept) for i, kept in values[axis].items()} for axis, *_ in _PER_LAYER},
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise PlanError(f"the plan is damaged: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing: one line per list of indices, so that plans can be compared as text."""
        entries = []
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
                entries.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}" if value else f"  {json.dumps(name)}: {{}}")
            else:
                entries.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        with replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PlanError: The file is missing, is not a plan, or not a valid one.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"the plan cannot be read: {error.strerror}", got=path) from error
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}", got=path) from error
        return cls.from_dict(values)


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
    if wrong := _differences(scores.architecture, arch):
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


def _differences(expected: Architecture, got: Architecture) -> str:
    """What differs between two models, `""` if nothing does. How far positions go is a matter of the run."""
    values = got.to_dict()
    return ", ".join(
        f"{name}={values[name]!r} instead of {value!r}"
        for name, value in expected.to_dict().items()
        if value != values[name] and name != "max_position_embeddings"
    )


def _check_indices(what: str, kept: Sequence[int], size: int) -> None:
    if not kept:
        raise PlanError(f"{what}: nothing is kept")
    if any(not isinstance(i, int) for i in kept) or list(kept) != sorted(set(kept)):
        raise PlanError(f"{what}: indices must be whole numbers in ascending order, each once")
    if kept[0] < 0 or kept[-1] >= size:
        raise PlanError(f"{what}: an index is out of range", got=f"{kept[0]} to {kept[-1]}", legal=f"0 to {size - 1}")


def _check_groups(what: str, kept: Sequence[int], size: int, groups: int) -> None:
    counts = [sum(i * groups // size == group for i in kept) for group in range(groups)]
    if len(set(counts)) > 1:
        raise PlanError(f"{what}: the {groups} groups keep different numbers", got=counts, legal="equal numbers")
