"""What the smaller model should be: sizes asked for, or a number of parameters that sizes are found for."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from megatron_ext.errors import PlanError
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP

GRID = 32  # widths are tried in steps of 1/32 of the original
ALIGNMENT = 8  # and are multiples of 8, which matrix units want
TOLERANCE = Fraction(5, 100)  # a plan may be this much smaller than the budget, never larger
BALANCE = Fraction(4, 3)  # hidden and inner widths shrink by factors that differ by no more than this


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is asked for; `None` is "as it is", or, with `params`, "as the budget needs".

    Attributes:
        num_layers: Blocks to keep (a mixer and its MLPs; see `megatron_ext.models.pattern`).
        params: A number of parameters: up to 1.0 a fraction of the original's, above it a count.
        embedding: Whether `params` counts the word embedding and the output layer.
    """

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    num_layers: int | None = None
    params: float | None = None
    embedding: bool = True

    def check(self, arch: Architecture) -> None:
        """Check that each size can be cut out of `arch`.

        Raises:
            PlanError: A size is out of range, does not keep groups equal, or is of a kind of layer the model lacks.
        """
        if all(getattr(self, field.name) is None for field in fields(self) if field.name != "embedding"):
            raise PlanError("no target given", legal="a size, a number of layers, or a number of parameters")
        kinds = {
            "ffn_hidden_size": MLP,
            "num_attention_heads": ATTENTION,
            "mamba_num_heads": MAMBA,
            "mamba_head_dim": MAMBA,
        }
        sizes = {field.name: getattr(arch, field.name, None) for field in fields(self)}
        sizes["num_layers"] = len(arch.layers.blocks)
        steps = {"num_attention_heads": arch.num_query_groups, "mamba_num_heads": arch.mamba_num_groups}
        for name, size in sizes.items():
            asked = getattr(self, name)
            if size is None or asked is None:
                continue
            if name in kinds and kinds[name] not in arch.pattern:
                raise PlanError(f"{name} cannot be cut: the model has no such layer", got=arch.pattern)
            step = steps.get(name, 1)
            if not 1 <= asked <= size or asked % step:
                legal = f"{step} to {size}" + (f" in steps of {step}, so that groups stay equal" if step > 1 else "")
                raise PlanError(f"{name} cannot be cut to {asked}", got=f"{name}={size} in the model", legal=legal)
        if self.params is not None and self.params <= 0:
            raise PlanError("the number of parameters must be positive", got=self.params)


def resolve(arch: Architecture, targets: Targets, pattern: str) -> Architecture:
    """The architecture of the smaller model, once it is known which sub-layers stay.

    Without `targets.params`, sizes are what is asked for. With it, this rule finds those that are not:

    - `hidden_size` takes the widths i/32 of the original, rounded down to multiples of 8; `ffn_hidden_size` and
      `mamba_num_heads` take the widths j/32 together, rounded down to multiples of 8 and of the SSM groups;
    - the two shrink in step: their factors differ by at most 4/3, unless one of them was asked for;
    - attention heads, Mamba head channels and depth stay as they are, unless asked for;
    - of all that are within 5% below the budget, the nearest wins; of equals, the widest hidden.

    Args:
        arch: The original.
        targets: Checked targets.
        pattern: The sub-layers that stay.

    Raises:
        PlanError: No candidate is within 5% below the budget; says what is reachable.
    """
    fixed = {field.name: getattr(targets, field.name) for field in fields(targets)}
    for name in ("num_layers", "params", "embedding"):
        fixed.pop(name)
    fixed = {name: value for name, value in fixed.items() if value is not None}
    shallow = replace(arch, pattern=pattern)
    if targets.params is None:
        return replace(shallow, **fixed)

    total = arch.num_parameters(embedding=targets.embedding)
    budget = round(targets.params * total) if targets.params <= 1 else round(targets.params)
    sized = [(small.num_parameters(embedding=targets.embedding), small) for small in _candidates(shallow, fixed)]
    within = [
        (count, small.hidden_size, small) for count, small in sized if (1 - TOLERANCE) * budget <= count <= budget
    ]
    if within:
        return max(within, key=lambda entry: entry[:2])[2]

    counts = sorted(count for count, _ in sized)
    below = max((count for count in counts if count <= budget), default=None)
    above = min((count for count in counts if count > budget), default=None)
    nearby = " and ".join(f"{count:,}" for count in (below, above) if count is not None)
    raise PlanError(
        "no plan reaches the target",
        got=f"{budget:,} parameters ({'with' if targets.embedding else 'without'} embeddings), of {total:,}",
        legal=f"{counts[0]:,} to {counts[-1]:,}, at most 5% below the target; nearest: {nearby}",
    )


def _candidates(arch: Architecture, fixed: dict[str, int]) -> Iterator[Architecture]:
    inner = {}
    if MLP in arch.pattern and "ffn_hidden_size" not in fixed:
        inner["ffn_hidden_size"] = (arch.ffn_hidden_size, ALIGNMENT)
    if MAMBA in arch.pattern and "mamba_num_heads" not in fixed:
        inner["mamba_num_heads"] = (arch.mamba_num_heads, arch.mamba_num_groups)
    hidden_steps = [GRID] if "hidden_size" in fixed else range(1, GRID + 1)
    inner_steps = range(1, GRID + 1) if inner else [GRID]
    in_step = "hidden_size" not in fixed and bool(inner)
    for i in hidden_steps:
        for j in inner_steps:
            if in_step and max(Fraction(i, j), Fraction(j, i)) > BALANCE:
                continue
            sizes = {"hidden_size": _round(arch.hidden_size, i, ALIGNMENT)}
            sizes |= {name: _round(size, j, unit) for name, (size, unit) in inner.items()}
            yield replace(arch, **(sizes | fixed))


def _round(size: int, step: int, unit: int) -> int:
    """`size * step/32`, rounded down to a multiple of `unit`, but at least one unit, and the size itself at 32/32."""
    return size if step == GRID else max(unit, size * step // GRID // unit * unit)
