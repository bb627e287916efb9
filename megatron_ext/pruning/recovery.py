"""What stands in place of dropped sub-layers: how it was fitted, its tensors, and the file that holds them.

The plan says which sub-layers; `recovery.safetensors` beside it has, by the first sub-layer that each stands for,
`{i}.bias`, `{i}.down`, `{i}.up`, and how well it does.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, KINDS, LINEAR, MLP
from megatron_ext.pruning.emulation import Emulator
from megatron_ext.pruning.saved_plan import Origin

if TYPE_CHECKING:
    from megatron_ext.pruning.plan import Plan

FILE, PICTURE = "recovery.safetensors", "recovery.png"
RANKS = (1, 4, 16, 64, 256, 1024)
"""Of which the table says what they explain."""
OUTPUT_BIAS = {ATTENTION: "self_attention.linear_proj.bias", MLP: "mlp.linear_fc2.bias", LINEAR: "bias"}
"""Of each kind of sub-layer that can have one, the bias that is added to the stream."""

Emulators = Mapping[int, Emulator]


@dataclass(frozen=True)
class Recovery:
    """How dropped sub-layers are emulated.

    Attributes:
        method: `bias`, or `low-rank`.
        into: `units`: linear sub-layers of the pattern, one in each place; `biases`: the output biases of the nearest
            sub-layers below that stay, which is the same function without a module.
        rank: Of the maps; 0 for a bias.
        ridge: In units of the median variance of a channel.
        stream: What they were fitted on: the `clean` one of the whole model, or the `pruned` one, which what is below
            has already been replaced in.
        skip: Tokens at the beginning of each sequence that were not counted.
        samples: Sequences.
        tokens: Of them, those that were counted.
    """

    method: Literal["bias", "low-rank"]
    into: Literal["units", "biases"]
    rank: int = 0
    ridge: float = 0.0
    stream: Literal["clean", "pruned"] = "clean"
    skip: int = 0
    samples: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self | None:
        """From `to_dict`'s values.

        Raises:
            PlanError: They say nothing that is known.
        """
        if values is None:
            return None
        try:
            found = cls(**values)
        except TypeError as error:
            raise PlanError(f"the plan's recovery is damaged: {error}", got=values) from None
        if found.method not in ("bias", "low-rank") or found.into not in ("units", "biases"):
            raise PlanError("the plan's recovery is not known", got=values, legal="bias, low-rank; units, biases")
        if type(found.rank) is not int or found.rank < 0:
            raise PlanError("the plan's recovery has no such rank", got=found.rank)
        return found


def host(pattern: str, kept: Sequence[int], first: int) -> int | None:
    """The sub-layer whose output bias takes in what stands for the sub-layer `first`; None for the embedding.

    Args:
        pattern: Of the source.
        kept: Sub-layers that stay.
        first: The first of those that are emulated.
    """
    below = [unit for unit in kept if unit < first]
    return max(below) if below else None


def no_host(source: Architecture, kept: Sequence[int], emulated: Mapping[int, Sequence[int]]) -> str:
    """Why biases cannot be folded into what stays of a model, "" if they can."""
    for first in emulated:
        below = host(source.pattern, kept, first)
        what = f"sub-layer {first}, {KINDS[source.pattern[first]]}"
        if below is None and not source.untie_embeddings_and_output_weights:
            return f"{what}: none stays below it, and the embedding is the output layer, too"
        if below is not None and source.pattern[below] not in OUTPUT_BIAS:
            return f"{what}: the nearest below that stays, {below}, is {KINDS[source.pattern[below]]}, without a bias"
    if source.moe_shared_expert_intermediate_size:
        return "Megatron's shared experts have no biases, and a model has all or none"
    return ""


def check(plan: "Plan") -> None:
    """Check that what is emulated goes, and that what stands for it has a place.

    Raises:
        PlanError: Says what is wrong.
    """
    how, source = plan.recovery, plan.source
    if (how is None) != (not plan.emulated):
        raise PlanError("a plan has both what is emulated and how, or neither", got=how)
    gone = set(range(len(source.pattern))) - set(plan.units)
    for first, units in plan.emulated.items():
        legal = tuple(range(first, first + len(units)))
        if not units or units != legal or not gone.issuperset(units):
            raise PlanError(f"emulated of sub-layer {first}", got=units, legal="it and dropped ones right after it")
        gone.difference_update(units)
    if how is None:
        return
    if how.into == "biases" and how.rank:
        raise PlanError("only a bias is folded into biases", got=f"rank {how.rank}")
    if how.into == "biases" and (reason := no_host(source, plan.units, plan.emulated)):
        raise PlanError("a bias has no place", got=reason, legal="--prune-recover-into units")
    if how.into == "units" and LINEAR in source.pattern and how.rank > source.linear_rank:
        legal = f"up to {source.linear_rank}, that of the linear sub-layers which the model has"
        raise PlanError("linear sub-layers have one rank", got=how.rank, legal=legal)


def origin(plan: "Plan", key: str, unit: int | None, old_key: str) -> Origin | None:
    """Where a weight of the target comes from, if not from the source's weight alone.

    Args:
        plan: The plan.
        key: The weight.
        unit: The sub-layer of the source in whose place it is.
        old_key: What the weight would be called there.
    """
    if plan.recovery is None:
        return None
    gather = axes.indices(plan.target, key, plan.kept(None)) if plan.hidden else ()
    if plan.recovery.into == "units":
        _, weight = axes.locate(plan.target, key)
        return Origin(f"recovery.{unit}.{weight.name}", gather) if unit in plan.emulated else None
    folded = _folded(plan)
    if not _has(plan.source, old_key):
        return Origin(f"recovery.{old_key}", gather if old_key in folded else ())
    if old_key not in folded:
        return None
    whole = axes.indices(plan.source, old_key, plan.kept(None))
    return Origin(old_key, whole, partial(_plus, bias=folded[old_key]))


def added(plan: "Plan", dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that `origin` names and the source lacks, of this type.

    Raises:
        PlanError: The plan came without its tensors, or they are those of another model.
    """
    if plan.recovery is None:
        return {}
    size, rank = plan.source.hidden_size, plan.target.linear_rank
    for first in plan.emulated:
        own = plan.emulators.get(first)
        parts = [] if own is None else [own.bias, own.down, own.up]
        shapes = [tuple(part.shape) for part in parts if part is not None]
        ranked = [(plan.recovery.rank, size), (size, plan.recovery.rank)] if plan.recovery.rank else []
        if shapes != [(size,), *ranked]:
            raise PlanError(f"the plan has no tensors for sub-layer {first}", got=shapes, legal=f"{FILE} beside it")
    if plan.recovery.into == "biases":
        folded = _folded(plan)
        names = {old_key: key for key in axes.keys(plan.target) if not _has(plan.source, old_key := _old(plan, key))}
        every = {n: folded[n] if n in folded else torch.zeros(axes.shape(plan.target, key)) for n, key in names.items()}
        return {f"recovery.{name}": value.to(dtype) for name, value in every.items()}
    tensors: dict[str, Tensor] = {}
    for first in plan.emulated:
        own = plan.emulators[first].of_rank(rank)
        parts = {"bias": own.bias, "down": own.down, "up": own.up}
        tensors |= {f"recovery.{first}.{name}": part.to(dtype) for name, part in parts.items() if part is not None}
    return tensors


def _old(plan: "Plan", key: str) -> str:
    """What a weight of the target is called in the source."""
    layer, weight = axes.locate(plan.target, key)
    return key if layer is None else f"{axes.LAYER}.{plan.places[layer][1]}.{weight.name}"


def _folded(plan: "Plan") -> dict[str, Tensor]:
    """What is added to biases, or to each row of the embedding, of the source."""
    found: dict[str, Tensor] = {}
    for first in plan.emulated:
        below = host(plan.source.pattern, plan.units, first)
        key = axes.EMBEDDING
        if below is not None:
            key = f"{axes.LAYER}.{below}.{OUTPUT_BIAS[plan.source.pattern[below]]}"
        own = plan.emulators[first].bias if first in plan.emulators else torch.zeros(plan.source.hidden_size)
        found[key] = found[key] + own if key in found else own
    return found


def _has(arch: Architecture, key: str) -> bool:
    try:
        axes.locate(arch, key)
    except CheckpointError:
        return False
    return True


def _plus(tensor: Tensor, bias: Tensor) -> Tensor:
    return (tensor.float() + bias).to(tensor.dtype)


def content(emulators: Emulators) -> bytes:
    """The tensors' file."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for first, own in sorted(emulators.items()):
        parts = {"bias": own.bias, "down": own.down, "up": own.up, "explained": own.explained}
        there = {name: part for name, part in parts.items() if part is not None}
        tensors |= {f"{first}.{name}": part.contiguous().clone() for name, part in there.items()}
        facts[str(first)] = {"size": own.size, "mean": own.mean}
    return save(tensors, {"facts": json.dumps(facts)})


def digest(emulators: Emulators) -> str:
    """The SHA-256 of the tensors' file."""
    return hashlib.sha256(content(emulators)).hexdigest()


def write(emulators: Emulators, path: str | Path) -> None:
    """Write the tensors' file, all or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content(emulators))


def attachments(plan: "Plan") -> dict[str, Callable[[Path], object]]:
    """What belongs beside the plan: the tensors' file, and a picture of what maps of each rank explain."""
    if plan.recovery is None:
        return {}
    files: dict[str, Callable[[Path], object]] = {FILE: partial(write, plan.emulators)}
    curves = {f"{first}": own.explained.numpy() for first, own in sorted(plan.emulators.items()) if len(own.explained)}
    if curves:
        from megatron_ext.pruning.pictures import plot_explained

        files[PICTURE] = partial(plot_explained, curves, plan.recovery.rank)
    return files


def read(path: str | Path, expected: str) -> dict[int, Emulator]:
    """Read it.

    Args:
        path: The file.
        expected: Its SHA-256; "" for whatever lies there.

    Raises:
        PlanError: It is missing, or another.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise PlanError(
            "the plan's tensors cannot be read", got=f"{path}: {error.strerror}", legal=f"{FILE} beside the plan"
        ) from error
    if expected and (found := hashlib.sha256(raw).hexdigest()) != expected:
        raise PlanError("the tensors beside the plan are not its own", got=f"{path}: {found}", legal=expected)
    try:
        tensors = load(raw)
        size = int.from_bytes(raw[:8], "little")
        facts = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["facts"])
        return {
            int(first): Emulator(
                tensors[f"{first}.bias"], tensors.get(f"{first}.down"), tensors.get(f"{first}.up"),
                **known, explained=tensors[f"{first}.explained"],
            )
            for first, known in facts.items()
        }  # fmt: skip
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"the plan's tensors are damaged: {error!r}", got=path) from error


def table(pattern: str, emulated: Mapping[int, Sequence[int]], emulators: Emulators) -> list[list[str]]:
    """Which sub-layers can be emulated: a row of headings, and one for each that is.

    Args:
        pattern: Of the source.
        emulated: The sub-layers that each stands for, by the first.
        emulators: What stands for them.
    """
    curves = [own.explained for own in emulators.values()]
    full = min((len(curve) - 1 for curve in curves), default=0)
    ranks = [rank for rank in RANKS if rank < full] + ([full] if full > 0 else [])
    names = [f"rank {rank}" for rank in ranks[:-1]] + (["full rank"] if ranks else [])
    rows = [["sub-layer", "", "update / stream", "mean", *names]]
    for first, units in sorted(emulated.items()):
        own = emulators[first]
        place = f"{first}" if len(units) == 1 else f"{first} to {units[-1]}"
        kinds = KINDS[pattern[first]] if len(units) == 1 else "".join(pattern[unit] for unit in units)
        shares = [f"{float(own.explained[rank]):.1%}" for rank in ranks]
        rows.append([place, kinds, f"{own.size:.3g}", f"{own.mean:.1%}", *shares])
    return rows
