"""The plan: what is kept of a model. A value that can be written by hand, diffed, replayed, and applied anywhere."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.writer import PATTERN, CheckpointSchema
from megatron_ext.errors import ConfigError, PlanError, nearest
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.dimensions import PER_LAYER
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE
from megatron_ext.pruning import recovery
from megatron_ext.pruning.emulation import Emulator
from megatron_ext.pruning.merge import merge_heads
from megatron_ext.pruning.recovery import Recovery
from megatron_ext.pruning.saved_plan import (
    FORMAT,
    Origin,
    Provenance,
    SavedPlan,
    check_indices,
    differences,
    entries_of,
    list_of,
)


@dataclass(frozen=True)
class PrunedAxis:
    """An axis of one kind of sub-layer on which a plan keeps positions.

    Attributes:
        field: Of `Plan`, and of `KeptIndices`.
        kind: Sub-layers that have it.
        size: Of `Architecture`: how many positions there are, per group if `per_group`.
        groups: Of `Architecture`: how many groups the positions lie in, each of which keeps as many; None for none.
        kept_groups: Of `Plan`: the axis of these groups.
        per_group: Whether `size` counts one group's positions.
    """

    field: str
    kind: str
    size: str
    groups: str | None = None
    kept_groups: str | None = None
    per_group: bool = False

    def num_groups(self, arch: Architecture) -> int:
        """Groups of the axis, 1 if it has none."""
        return 1 if self.groups is None else getattr(arch, self.groups)

    def positions(self, arch: Architecture) -> int:
        """Positions over all groups."""
        return getattr(arch, self.size) * (self.num_groups(arch) if self.per_group else 1)


PRUNED_AXES = (
    PrunedAxis("ffn", MLP, "ffn_hidden_size"),
    PrunedAxis("kv_groups", ATTENTION, "num_query_groups"),
    PrunedAxis("query_heads", ATTENTION, "num_attention_heads", "num_query_groups", "kv_groups"),
    PrunedAxis("mamba_groups", MAMBA, "mamba_num_groups"),
    PrunedAxis("mamba_heads", MAMBA, "mamba_num_heads", "mamba_num_groups", "mamba_groups"),
    PrunedAxis("head_channels", MAMBA, "mamba_head_dim"),
    PrunedAxis("states", MAMBA, "mamba_state_dim", "mamba_num_groups", "mamba_groups", per_group=True),
    PrunedAxis("experts", MOE, "num_experts"),
    PrunedAxis("expert_ffn", MOE, "moe_ffn_hidden_size", "num_experts", "experts", per_group=True),
    PrunedAxis("shared_ffn", MOE, "moe_shared_expert_intermediate_size"),
)
_PER_LAYER_FIELDS = (*(axis.field for axis in PRUNED_AXES), "merged_heads", "emulated")
_ENTRIES = ("format", "source", "target", "provenance", "units", "hidden", *_PER_LAYER_FIELDS, "recovery")
_Kept = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Plan(SavedPlan):
    """What is kept of the model `source`, which makes it the model `target`.

    All indices count positions of the source, ascending. Per-layer entries are keyed by the sub-layer's index in the
    source; an absent one keeps everything (of the groups that stay), as does `hidden=None`.

    Attributes:
        units: Sub-layers that stay.
        hidden: Channels of the residual stream that stay.
        ffn, kv_groups, query_heads, mamba_groups, mamba_heads, head_channels, states, experts, expert_ffn, shared_ffn:
            Positions that stay, for each sub-layer; what they are says `megatron_ext.models.axes.KeptIndices`.
        merged_heads: For each attention layer, pairs (kept query head, dropped one): the kept head becomes twice itself
            minus the dropped one (Minitron's head merge, arXiv 2407.14679).
        emulated: Of the sub-layers that go, those that something stands for: by the first all that it stands for.
        recovery: How; None if nothing stands for any.
        emulators: What stands for them, which a file beside the plan holds.

    Raises:
        PlanError: Indices are out of order or range, groups become unequal, or the result is not `target`.
    """

    source: Architecture
    target: Architecture
    hidden: tuple[int, ...] | None = None
    ffn: _Kept = field(default_factory=dict)
    kv_groups: _Kept = field(default_factory=dict)
    query_heads: _Kept = field(default_factory=dict)
    mamba_groups: _Kept = field(default_factory=dict)
    mamba_heads: _Kept = field(default_factory=dict)
    head_channels: _Kept = field(default_factory=dict)
    states: _Kept = field(default_factory=dict)
    experts: _Kept = field(default_factory=dict)
    expert_ffn: _Kept = field(default_factory=dict)
    shared_ffn: _Kept = field(default_factory=dict)
    merged_heads: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    emulated: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    recovery: Recovery | None = None
    emulators: Mapping[int, Emulator] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        source, target = self.source, self.target
        check_indices("units", self.units, len(source.pattern))
        recovery.check(self)
        result: dict[str, Any] = {"pattern": "".join(own for own, _ in self.places)}
        if self.recovery is not None and self.recovery.into == "units":
            result["linear_rank"] = max(self.recovery.rank, source.linear_rank)
        elif self.recovery is not None:
            result["add_bias_linear"] = True
        result["attention_windows"] = source.windows_of(self.units)
        if self.hidden is not None:
            check_indices("hidden", self.hidden, source.hidden_size)
            result["hidden_size"] = len(self.hidden)
        uneven: dict[str, tuple[int, ...]] = {}
        for axis in PRUNED_AXES:
            for layer in getattr(self, axis.field):
                if layer not in self.units or source.pattern[layer] != axis.kind:
                    raise PlanError(f"{axis.field} of sub-layer {layer}: it is not kept, or has no such axis")
            sizes = tuple(self._size(axis, i) for i in self.units if source.pattern[i] == axis.kind)
            if not sizes:
                result[axis.size] = getattr(target, axis.size)
            elif len(set(sizes)) == 1:
                result[axis.size] = sizes[0]
            elif axis.size in PER_LAYER:
                uneven[axis.size] = sizes
            else:
                raise PlanError(
                    f"{axis.field}: layers keep different numbers", got=sorted(set(sizes)), legal="one number"
                )
        self._check_merged()
        if wrong := differences(replace(source, **result, layer_sizes=uneven), target):
            raise PlanError(
                "what is kept does not make the target", got=wrong, legal="; ".join(map(str, result.items()))
            )

    @property
    def places(self) -> list[tuple[str, int]]:
        """The kind of each sub-layer of the target, and which one of the source it is or stands for."""
        units = {unit: self.source.pattern[unit] for unit in self.units}
        if self.recovery is not None and self.recovery.into == "units":
            units |= dict.fromkeys(self.emulated, LINEAR)
        return [(kind, unit) for unit, kind in sorted(units.items())]

    def _size(self, axis: PrunedAxis, layer: int) -> int:
        """What the size that an axis sets becomes in one sub-layer, once its indices are checked."""
        own = self.source.at(layer)
        kept = getattr(self, axis.field).get(layer)
        groups = axis.num_groups(own)
        kept_groups = getattr(self, axis.kept_groups).get(layer) if axis.kept_groups else None
        kept_groups = range(groups) if kept_groups is None else kept_groups
        if kept is None:
            size = axis.positions(own) // groups * len(kept_groups)
        else:
            what = f"{axis.field} of sub-layer {layer}"
            check_indices(what, kept, axis.positions(own))
            per_group = axis.positions(own) // groups
            counts = Counter(i // per_group for i in kept)
            if axis.groups is not None and (set(counts) != set(kept_groups) or len(set(counts.values())) > 1):
                numbers = ", ".join(f"group {group}: {counts[group]}" for group in sorted(counts.keys() | kept_groups))
                legal = "equal numbers in the groups that stay: " + ", ".join(map(str, kept_groups))
                raise PlanError(f"{what}: the groups keep different numbers", got=numbers, legal=legal)
            size = len(kept)
        return size // len(kept_groups) if axis.per_group else size

    def _check_merged(self) -> None:
        per_group = self.source.num_attention_heads // self.source.num_query_groups
        for layer, pairs in self.merged_heads.items():
            what = f"merged_heads of sub-layer {layer}"
            kept = set(self.query_heads.get(layer, ()))
            taken: set[int] = set()
            for pair in pairs:
                if not isinstance(pair, tuple) or len(pair) != 2 or any(type(head) is not int for head in pair):
                    raise PlanError(f"{what}: not a pair of query heads", got=pair)
                head, dropped = pair
                if head not in kept or dropped in kept or head // per_group != dropped // per_group:
                    raise PlanError(what, got=pair, legal="a query head that stays and one of its group that does not")
                if head in taken:
                    raise PlanError(f"{what}: query head {head} takes in two others", got=pairs, legal="one")
                taken.add(head)

    @staticmethod
    def model_of(step: Path) -> Architecture:
        """As its arguments say."""
        return layout.architecture(step)

    def schema(self, entries: Mapping[str, TensorEntry]) -> CheckpointSchema:
        """That of layer patterns."""
        return PATTERN

    def origin(self, key: str) -> Origin:
        """Where a weight of the target comes from."""
        layer, weight = axes.locate(self.target, key)
        old_layer = None if layer is None else self.places[layer][1]
        old_key = key if old_layer is None else f"{axes.LAYER}.{old_layer}.{weight.name}"
        if own := recovery.origin(self, key, old_layer, old_key):
            return own
        pairs = self.merged_heads.get(old_layer) if weight.axes[0] == "qkv" and old_layer is not None else None
        merge = partial(merge_heads, self.source, pairs=pairs) if pairs else None
        return Origin(old_key, axes.indices(self.source, old_key, self.kept(old_layer)), merge)

    def recovered(
        self,
        emulated: Mapping[int, tuple[int, ...]],
        how: Recovery,
        emulators: Mapping[int, Emulator] | None = None,
    ) -> Self:
        """This plan with something in place of what it drops.

        Args:
            emulated: See the attribute.
            how: Likewise.
            emulators: Likewise; none to see whether it can be.

        Raises:
            PlanError: It has such already, or biases have no place.
        """
        if self.recovery is not None:
            raise PlanError("something stands for what the plan drops already", got=self.recovery.method)
        target: dict[str, Any] = {"add_bias_linear": True}
        if how.into == "units":
            units = {unit: self.source.pattern[unit] for unit in self.units} | dict.fromkeys(emulated, LINEAR)
            target = {"pattern": "".join(units[unit] for unit in sorted(units))}
            target["linear_rank"] = max(how.rank, self.source.linear_rank)
        elif reason := recovery.no_host(self.source, self.units, emulated):
            raise PlanError("a bias has no place", got=reason, legal="--prune-recover-into units")
        found = emulators or {}
        provenance = replace(self.provenance, tensors=recovery.digest(found) if found else "")
        return replace(
            self, target=replace(self.target, **target), emulated=emulated, recovery=how, emulators=found,
            provenance=provenance,
        )  # fmt: skip

    def added(self, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        """What stands for dropped sub-layers, and the biases that come with it."""
        return recovery.added(self, entries[axes.EMBEDDING].dtype)

    def attachments(self) -> dict[str, Callable[[Path], object]]:
        """The file of what stands for dropped sub-layers, and its picture."""
        return recovery.attachments(self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, and the tensors beside it.

        Raises:
            PlanError: The file is missing, is not a plan, or not a valid one; or its tensors are missing, or others.
            CheckpointError: It lies in the directory that it was written into, and is not what was written.
        """
        plan = super().load(path)
        if plan.recovery is None:
            return plan
        emulators = recovery.read(Path(path).with_name(recovery.FILE), plan.provenance.tensors)
        return replace(plan, emulators=emulators)

    @classmethod
    def keep_everything(cls, arch: Architecture) -> Self:
        """The plan that changes nothing."""
        return cls(source=arch, target=arch, units=tuple(range(len(arch.pattern))))

    def kept(self, layer: int | None = None) -> KeptIndices:
        """What is kept of a sub-layer of the source; of the model's own weights for `None`."""
        if layer is None:
            return KeptIndices(hidden=self.hidden)
        own = {axis.field: getattr(self, axis.field).get(layer) for axis in PRUNED_AXES}
        return KeptIndices(hidden=self.hidden, **own)

    def then(self, later: "Plan") -> "Plan":
        """One plan that cuts as this one and then `later` does.

        Args:
            later: A plan for this one's target.

        Raises:
            PlanError: `later` is for another model, or merges heads, which one plan can say only of original heads.
        """
        later.check(self.target)
        if later.merged_heads:
            raise PlanError("query heads can be merged only by the first of several plans")
        if self.recovery or later.recovery:
            raise PlanError("a model in which something stands for dropped sub-layers is cut by a plan of its own")
        hidden = later.hidden if self.hidden is None or later.hidden is None else _of(self.hidden, later.hidden)
        entries: dict[str, dict[int, Any]] = {name: {} for name in _PER_LAYER_FIELDS}
        for place, layer in ((i, self.units[i]) for i in later.units):
            for axis in PRUNED_AXES:
                if axis.kind != self.source.pattern[layer]:
                    continue
                if layer in getattr(self, axis.field) or place in getattr(later, axis.field):
                    entries[axis.field][layer] = _of(self._positions(axis, layer), later._positions(axis, place))
            heads = entries["query_heads"].get(layer, ())
            if pairs := tuple(pair for pair in self.merged_heads.get(layer, ()) if pair[0] in heads):
                entries["merged_heads"][layer] = pairs
        per_layer: dict[str, Any] = {**entries}
        return Plan(
            source=self.source, target=later.target, units=_of(self.units, later.units),
            hidden=self.hidden if hidden is None else hidden, provenance=self.provenance, **per_layer,
        )  # fmt: skip

    def _positions(self, axis: PrunedAxis, layer: int) -> Sequence[int]:
        """All positions that stay on one axis of a sub-layer, also those that no entry names."""
        if (kept := getattr(self, axis.field).get(layer)) is not None:
            return kept
        own = self.source.at(layer)
        groups, per_group = axis.num_groups(own), axis.positions(own) // axis.num_groups(own)
        staying = getattr(self, axis.kept_groups).get(layer) if axis.kept_groups else None
        return [g * per_group + i for g in (range(groups) if staying is None else staying) for i in range(per_group)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; the inverse of `from_dict`."""
        names = [name for name in _PER_LAYER_FIELDS if name != "emulated" or self.recovery]
        per_layer = {
            name: {str(layer): list(kept) for layer, kept in sorted(getattr(self, name).items())} for name in names
        }
        how = {} if self.recovery is None else {"recovery": self.recovery.to_dict()}
        return {
            "format": FORMAT,
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "provenance": asdict(self.provenance),
            "units": list(self.units),
            "hidden": None if self.hidden is None else list(self.hidden),
            **per_layer,
            **how,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From `to_dict`'s values.

        Raises:
            PlanError: They are not a plan, or not a valid one.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise PlanError("this is not a plan", legal=f'JSON with "format": "{FORMAT}"')
        for name in values:
            if name not in _ENTRIES:
                raise PlanError(f"a plan has no {name!r}", legal=nearest(name, _ENTRIES))
        try:
            per_layer: dict[str, Any] = {name: entries_of(name, values.get(name, {})) for name in _PER_LAYER_FIELDS}
            return cls(
                source=Architecture.from_dict(values["source"]),
                target=Architecture.from_dict(values["target"]),
                units=list_of("units", values["units"]),
                hidden=None if values["hidden"] is None else list_of("hidden", values["hidden"]),
                provenance=Provenance(**values["provenance"]),
                recovery=Recovery.from_dict(values.get("recovery")),
                **per_layer,
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise PlanError(f"the plan is damaged: {error!r}") from error


def _of(positions: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    return tuple(positions[i] for i in kept)
