"""What every plan is, of whatever family of models: a value that can be written by hand, diffed, replayed, and applied.

It is JSON on disk. What it keeps, and of which axes, says the family's own plan (`plan.Plan` of language models).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.file_checksums import check_file
from megatron_ext.checkpoint.writer import CheckpointSchema
from megatron_ext.errors import PlanError
from megatron_ext.families.family import Model

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
        tensors: SHA-256 of the file beside the plan that holds what stands for dropped layers (`recovery`).
    """

    model: str = ""
    iteration: int = 0
    fingerprint: str = ""
    scores: str = ""
    data: str = ""
    seed: int = 0
    metric: str = ""
    tensors: str = ""


class Origin(NamedTuple):
    """Where a weight of the smaller model comes from.

    Attributes:
        key: Of the original's weight.
        gather: For each of its dimensions the positions that are taken, `None` for all.
        function: Applied to it first.
    """

    key: str
    gather: tuple[Tensor | None, ...]
    function: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class SavedPlan(ABC):
    """What is kept of the model `source`, which makes it the model `target`.

    Attributes:
        units: Sub-layers of the source that stay.
        provenance: Where the plan comes from.
    """

    source: Any
    target: Any
    units: tuple[int, ...]
    provenance: Provenance = Provenance()

    @staticmethod
    @abstractmethod
    def model_of(step: Path) -> Any:
        """The model that a checkpoint's step holds.

        Raises:
            CheckpointError: It is of another family.
        """

    @abstractmethod
    def schema(self, entries: Mapping[str, TensorEntry]) -> CheckpointSchema:
        """How a checkpoint that has these tensors of the source keeps a model; the target is kept alike."""

    @abstractmethod
    def origin(self, key: str) -> Origin:
        """Where a weight of the target comes from."""

    def added(self, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        """Tensors that origins name and the original, which has `entries`, lacks; by the names that they give."""
        return {}

    def attachments(self) -> dict[str, Callable[[Path], object]]:
        """Files that belong beside the plan, by name, with what writes them."""
        return {}

    @abstractmethod
    def then(self, later: Any) -> Self:
        """One plan that cuts as this one and then `later`, a plan for this one's target, does."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; the inverse of `from_dict`."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From `to_dict`'s values.

        Raises:
            PlanError: They are not a plan, or not a valid one.
        """

    def check(self, arch: Model) -> None:
        """Check that this plan was made for `arch`.

        Raises:
            PlanError: Names every difference.
        """
        if wrong := differences(self.source, arch):
            raise PlanError("the plan belongs to another model", got=wrong)

    @property
    def fingerprint(self) -> str:
        """A hash of what is cut, whatever the provenance: 16 hexadecimal digits."""
        content = self.to_dict()
        content.pop("provenance")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing: one line per list of indices, so that plans can be compared as text."""
        entries = []
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
                entries.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}" if value else f"  {json.dumps(name)}: {{}}")
            else:
                entries.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        with atomic_write(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PlanError: The file is missing, is not a plan, or not a valid one.
            CheckpointError: It lies in the directory that it was written into, and is not what was written.
        """
        check_file(path)
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        except PlanError:
            raise
        except OSError as error:
            raise PlanError(f"the plan cannot be read: {error.strerror}", got=path) from error
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}", got=path) from error
        return cls.from_dict(values)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would take the last of equal keys."""
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise PlanError(f"the plan has the key {twice[0]!r} twice in one place", legal="each once")
    return dict(pairs)


def entries_of(name: str, values: Any) -> dict[int, tuple[Any, ...]]:
    """Per-layer entries from JSON, which has neither whole numbers as keys nor tuples."""
    if not isinstance(values, Mapping):
        raise PlanError(f"{name}: not indices by sub-layer", got=values, legal='{"0": [0, 1]}')
    for key in values:
        if not key.isdecimal() or str(int(key)) != key:
            raise PlanError(f"{name}: a key is not the number of a sub-layer", got=repr(key))
    entries = {int(key): list_of(f"{name} of sub-layer {key}", kept) for key, kept in values.items()}
    return {layer: tuple(tuple(v) if isinstance(v, list) else v for v in kept) for layer, kept in entries.items()}


def list_of(what: str, values: Any) -> tuple[Any, ...]:
    """Indices from JSON."""
    if not isinstance(values, list):
        raise PlanError(f"{what}: not a list of indices", got=values)
    return tuple(values)


def differences(expected: Model, got: Model) -> str:
    """What differs between two models, `""` if nothing does. How far positions go is a matter of the run."""
    values = got.to_dict()
    return ", ".join(
        f"{name}={values.get(name)!r} instead of {value!r}"
        for name, value in expected.to_dict().items()
        if value != values.get(name) and name != "max_position_embeddings"
    )


def check_indices(what: str, kept: Sequence[int], size: int) -> None:
    """Check that they are ascending positions of an axis of this size.

    Raises:
        PlanError: They are not.
    """
    if not kept:
        raise PlanError(f"{what}: nothing is kept")
    if set(map(type, kept)) != {int}:
        wrong = next(i for i in kept if type(i) is not int)
        raise PlanError(f"{what}: an index is not a whole number", got=repr(wrong), legal=f"0 to {size - 1}")
    if list(kept) != sorted(set(kept)):
        wrong = next(place for place in range(1, len(kept)) if kept[place] <= kept[place - 1])
        raise PlanError(
            f"{what}: indices must be in ascending order, each once", got=f"{kept[wrong]} after {kept[wrong - 1]}"
        )
    if kept[0] < 0 or kept[-1] >= size:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(f"{what}: an index is out of range", got=wrong, legal=f"0 to {size - 1}")
