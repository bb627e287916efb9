"""What is kept of an image network: blocks, and positions inside them."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.writer import CheckpointSchema
from megatron_ext.errors import ConfigError, PlanError, nearest
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
from megatron_ext.vision.architecture import WIDTHS, MambaVision
from megatron_ext.vision.average import buffer_name
from megatron_ext.vision.checkpoint import model_of
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.network import Network
from megatron_ext.vision.pruning.axes import LAST, TABLE, blocks_of, size

_BACKBONE, _AVERAGE, _STEP = "backbone.", "average.", "average.step"
_IN_A_BLOCK = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.(.+)")
_LINEARS = {"M": ("in_proj", "x_proj", "dt_proj", "out_proj"), "S": ("qkv", "proj")}


@dataclass(frozen=True, kw_only=True)
class ImagePlan(SavedPlan):
    """What is kept of the network `source`, which makes it the network `target`.

    Attributes:
        units: Blocks that stay, numbered from the first stage to the last.
        kept: By width (`architecture.WIDTHS`) and block of the source the positions that stay; all where none is named.

    Raises:
        PlanError: Indices are out of order or range, blocks of a stage become unequal, or the result is not `target`.
    """

    source: MambaVision
    target: MambaVision
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = blocks_of(self.source)
        check_indices("units", self.units, len(blocks))
        for width, own in self.kept.items():
            if width not in WIDTHS:
                raise PlanError("no such width", got=width, legal=nearest(width, WIDTHS))
            for number, positions in own.items():
                if number not in self.units or width not in LAST[blocks[number].kind]:
                    raise PlanError(f"{width} of block {number}: it is not kept, or has no such axis")
                check_indices(f"{width} of block {number}", positions, size(self.source, blocks[number].stage, width))
        if wrong := differences(self._result(), self.target):
            raise PlanError("what is kept does not make the target", got=wrong)

    def _result(self) -> MambaVision:
        return pruned(
            self.source, self.units,
            {width: {block: len(kept) for block, kept in own.items()} for width, own in self.kept.items()},
        )  # fmt: skip

    @classmethod
    def keep_everything(cls, model: MambaVision) -> Self:
        """The plan that changes nothing."""
        return cls(source=model, target=model, units=tuple(range(len(blocks_of(model)))))

    @staticmethod
    def model_of(step: Path) -> MambaVision:
        """As its arguments say."""
        return model_of(step)

    def schema(self, entries: Mapping[str, TensorEntry]) -> CheckpointSchema:
        """With the average of the weights if the source has it."""
        return CheckpointSchema(
            partial(_tensors, averaged=_STEP in entries), _states,
            lambda model: vars(FAMILY.with_model(Namespace(), model)),
        )  # fmt: skip

    def origin(self, key: str) -> Origin:
        """Where a weight of the target, or its average, comes from."""
        name = key.removeprefix(_BACKBONE)
        averaged = key.startswith(_AVERAGE)
        if averaged:
            name = key.removeprefix(_AVERAGE).replace("/", ".")
        found = _IN_A_BLOCK.fullmatch(name)
        if found is None:
            return Origin(key, ())
        places = [block[:2] for block in blocks_of(self.target)]
        number = self.units[places.index((int(found[1]), int(found[2])))]
        block = blocks_of(self.source)[number]
        old = block.key(found[3])
        own = {width: positions[number] for width, positions in self.kept.items() if number in positions}
        axes = TABLE[block.kind].get(found[3], ())
        gather = [None if a is None or a.width not in own else a.taken(self.source, own[a.width]) for a in axes]
        return Origin(_AVERAGE + buffer_name(old) if averaged else _BACKBONE + old, tuple(gather))

    def then(self, later: "ImagePlan") -> "ImagePlan":
        """One plan that cuts as this one and then `later`, a plan for this one's target, does."""
        later.check(self.target)
        units = tuple(self.units[i] for i in later.units)
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        for width in WIDTHS:
            first, second = self.kept.get(width, {}), later.kept.get(width, {})
            for place in later.units:
                number = self.units[place]
                if place in second:
                    own = second[place]
                    kept.setdefault(width, {})[number] = tuple(
                        first[number][i] if number in first else i for i in own
                    )  # fmt: skip
                elif number in first:
                    kept.setdefault(width, {})[number] = first[number]
        return ImagePlan(
            source=self.source, target=later.target, units=units, kept=kept, provenance=self.provenance
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        kept = {
            width: {str(block): list(positions) for block, positions in sorted(own.items())}
            for width, own in self.kept.items()
        }
        return {
            "format": FORMAT, "family": FAMILY.name, "source": self.source.to_dict(), "target": self.target.to_dict(),
            "provenance": asdict(self.provenance), "units": list(self.units), "kept": kept,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From `to_dict`'s values.

        Raises:
            PlanError: They are not a plan of an image network, or not a valid one.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT or values.get("family") != FAMILY.name:
            legal = f'JSON with "format": "{FORMAT}" and "family": "{FAMILY.name}"'
            raise PlanError("this is not a plan of an image network", legal=legal)
        try:
            return cls(
                source=MambaVision(**values["source"]), target=MambaVision(**values["target"]),
                units=list_of("units", values["units"]), provenance=Provenance(**values["provenance"]),
                kept={width: entries_of(width, own) for width, own in values["kept"].items()},
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise PlanError(f"the plan is damaged: {error!r}") from error


def pruned(
    source: MambaVision, units: Sequence[int], counts: Mapping[str, Mapping[int, int]]
) -> MambaVision:  # fmt: skip
    """The network that so many positions of some blocks make.

    Args:
        source: The whole network.
        units: Blocks that stay.
        counts: By width and block how many positions stay; all where none is named.

    Raises:
        PlanError: Blocks of a stage keep different numbers.
    """
    blocks, patterns = blocks_of(source), ["", "", "", ""]
    sizes: dict[str, dict[int, set[int]]] = {width: {} for width in WIDTHS}
    for number in units:
        stage, _, kind = blocks[number]
        patterns[stage] += kind
        for width in LAST[kind]:
            own = counts.get(width, {}).get(number, size(source, stage, width))
            sizes[width].setdefault(stage, set()).add(own)
    widths = {}
    for width, found in sizes.items():
        for stage, own in found.items():
            if len(own) > 1:
                what = f"{width}: blocks of stage {stage + 1} keep different numbers"
                raise PlanError(what, got=sorted(own), legal="one number")
        widths[width] = [next(iter(found.get(s, {source.whole(width, s)}))) for s in range(4)]
    return replace(source, pattern="/".join(patterns)).with_widths(widths)


def _tensors(model: MambaVision, averaged: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = Network(model).state_dict()
    found = {_BACKBONE + name: tuple(value.shape) for name, value in state.items()}
    if averaged:
        floats = {name: value for name, value in state.items() if value.is_floating_point()}
        found |= {_AVERAGE + buffer_name(name): tuple(value.shape) for name, value in floats.items()}
        found[_STEP] = ()
    return found


def _states(model: MambaVision) -> dict[str, tuple[int, ...]]:
    names = {
        block.key(name)
        for block in blocks_of(model)
        if block.kind in _LINEARS
        for name in ("fc1", "fc2", *(f"mixer.{linear}" for linear in _LINEARS[block.kind]))
    }
    return {_BACKBONE + name: (1,) for name in sorted(names)}
