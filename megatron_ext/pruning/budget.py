"""What the smaller model should be: sizes asked for, or a budget that sizes are found for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, gcd, lcm
from typing import Any, Self

from megatron_ext.errors import PlanError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import Workload, memory_bytes
from megatron_ext.models.pattern import ATTENTION, KINDS, MAMBA, MLP, MOE
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan

GRID = 32  # widths are tried in steps of 1/32 of the original
WIDE = 2048  # from this width up, widths are multiples of 64; below, of 8, which matrix units want
TOLERANCE = Fraction(5, 100)  # a plan may be this much smaller than the budget, never larger
BALANCE = Fraction(4, 3)  # hidden and inner widths shrink by factors that differ by no more than this

_KINDS = {
    "ffn_hidden_size": MLP,
    "num_query_groups": ATTENTION,
    "num_attention_heads": ATTENTION,
    "mamba_num_groups": MAMBA,
    "mamba_num_heads": MAMBA,
    "mamba_head_dim": MAMBA,
    "mamba_state_dim": MAMBA,
    "num_experts": MOE,
    "moe_ffn_hidden_size": MOE,
    "moe_shared_expert_intermediate_size": MOE,
}
_INNER = ("ffn_hidden_size", "mamba_num_heads", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
# What lies in groups, and the size that counts these.
_GROUPS = {"num_attention_heads": "num_query_groups", "mamba_num_heads": "mamba_num_groups"}
# Targets that count the sub-layers of one kind.
_LAYERS = {"attention_layers": ATTENTION, "mamba_layers": MAMBA, "mlp_layers": MLP, "moe_layers": MOE}
SIZES = ("hidden_size", *_KINDS)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is asked for; `None` is "as it is", or, with a budget, "as the budget needs".

    Attributes:
        num_attention_heads: Query heads over all groups that stay. Where `num_query_groups` is cut and this is not
            asked for, the heads of the dropped groups go; so it is with `mamba_num_heads` and `mamba_num_groups`.
        num_experts: Experts of each mixture; at least as many as a token needs, and what expert parallelism divides.
        moe_ffn_hidden_size: Neurons of each expert.
        moe_shared_expert_intermediate_size: Neurons of the shared expert.
        num_layers: Blocks to keep (a mixer and its MLPs; see `megatron_ext.models.pattern`).
        num_sublayers: Sub-layers to keep, of whatever kind.
        attention_layers, mamba_layers, mlp_layers, moe_layers: Sub-layers of one kind to keep: from 1 up a number,
            below 1 a fraction, rounded to the nearest number (half up).
        depth_metric: By which sub-layers or blocks are chosen: one of `DEPTH_METRICS`.
        params: A number of parameters: up to 1.0 a fraction of the original's, above it a count.
        embedding: Whether `params` counts the word embedding and the output layer.
        memory: Bytes of 16-bit weights and of the caches of `workload`.
        workload: What `memory` is to serve.
        per_layer: Sizes that become an average: `ffn_hidden_size`, `mamba_num_heads`; each layer keeps as many as its
            share of the most important ones.
        hidden_divisor, ffn_divisor, mamba_heads_divisor: What sizes found for a budget, or layer by layer, are
            multiples of; by default 64 for a width from 2048 up, 8 below it, and the SSM groups for Mamba-2 heads.
    """

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    num_attention_heads: int | None = None
    mamba_num_groups: int | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    mamba_state_dim: int | None = None
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    num_layers: int | None = None
    num_sublayers: int | None = None
    attention_layers: float | None = None
    mamba_layers: float | None = None
    mlp_layers: float | None = None
    moe_layers: float | None = None
    depth_metric: str = "block_influence"
    params: float | None = None
    embedding: bool = True
    memory: float | None = None
    workload: Workload = field(default_factory=Workload)
    per_layer: tuple[str, ...] = ()
    hidden_divisor: int | None = None
    ffn_divisor: int | None = None
    mamba_heads_divisor: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes asked for, by their names in `Architecture`."""
        return {name: size for name in SIZES if (size := getattr(self, name)) is not None}

    def kinds(self, arch: Architecture) -> dict[str, int]:
        """How many sub-layers of each kind are asked for, by their letters."""
        counts = {}
        for name, kind in _LAYERS.items():
            if (asked := getattr(self, name)) is not None:
                counts[kind] = int(asked * arch.pattern.count(kind) + 0.5) if asked < 1 else int(asked)
        return counts

    def chosen_kinds(self, arch: Architecture) -> str:
        """The letters of the kinds of which some sub-layers are asked for: neither all nor none."""
        return "".join(kind for kind, count in self.kinds(arch).items() if 0 < count < arch.pattern.count(kind))

    def check(self, arch: Architecture) -> None:
        """Check that each size can be cut out of `arch`.

        Raises:
            PlanError: A size is out of range, does not keep groups equal, or is of a kind of layer the model lacks.
        """
        self._check_depth(arch)
        depth = self.num_layers is not None or self.num_sublayers is not None or self.kinds(arch)
        if not self.sizes and not depth and self.params is None and self.memory is None:
            legal = "a budget such as --prune-target-params 0.5, a size, or a number of layers"
            raise PlanError("no target given", legal=legal)
        if self.params is not None and self.memory is not None:
            raise PlanError("two budgets given", got="params and memory", legal="one of them")
        for name, asked in self.sizes.items():
            size: int = getattr(arch, name)
            if name in _KINDS and _KINDS[name] not in arch.pattern:
                raise PlanError(f"{name} cannot be cut: the model has no such layer", got=arch.pattern)
            step, most = 1, size
            least = arch.moe_router_topk if name == "num_experts" else 1
            if name in _GROUPS:
                groups: int = getattr(arch, _GROUPS[name])
                step: int = self.sizes.get(_GROUPS[name], groups)
                most = size // groups * step
            if not least <= asked <= most or asked % step:
                legal = f"{max(step, least)} to {most}"
                legal += f" in steps of {step}, so that groups stay equal" if step > 1 else ""
                legal += ", as many as a token needs or more" if least > 1 else ""
                raise PlanError(f"{name} cannot be cut to {asked}", got=f"{name}={size} in the model", legal=legal)
        for name in ("params", "memory", "hidden_divisor", "ffn_divisor", "mamba_heads_divisor"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise PlanError(f"{name} must be positive", got=value)
        for name in self.per_layer:
            if name not in ("ffn_hidden_size", "mamba_num_heads") or _KINDS[name] not in arch.pattern:
                legal = [name for name in ("ffn_hidden_size", "mamba_num_heads") if _KINDS[name] in arch.pattern]
                raise PlanError(f"{name} cannot differ from layer to layer", legal=", ".join(legal) or "none here")

    def _check_depth(self, arch: Architecture) -> None:
        if self.depth_metric not in DEPTH_METRICS:
            raise PlanError("unknown depth metric", got=self.depth_metric, legal=", ".join(DEPTH_METRICS))
        kinds = self.kinds(arch)
        ways = [self.num_layers is not None, self.num_sublayers is not None, bool(kinds)]
        if sum(ways) > 1:
            legal = "one of: num_layers; num_sublayers; the layers of each kind"
            raise PlanError("depth is asked for in more than one way", legal=legal)
        if kinds and isinstance(DEPTH_METRICS[self.depth_metric], Scan):
            raise PlanError(f"{self.depth_metric} drops a run of whatever kind", legal="num_layers or num_sublayers")
        limits = {"num_layers": len(arch.layers.blocks), "num_sublayers": len(arch.pattern)}
        for name, most in limits.items():
            if (asked := getattr(self, name)) is not None and not 1 <= asked <= most:
                raise PlanError(f"{name} cannot be cut to {asked}", got=f"{most} in the model", legal=f"1 to {most}")
        for name, kind in _LAYERS.items():
            asked, most = getattr(self, name), arch.pattern.count(kind)
            if asked is not None and (not 0 <= asked <= most or (asked >= 1 and asked != int(asked))):
                legal = f"0 to {most}, or a fraction below 1" if most else f"no such target: no {KINDS[kind]} layers"
                raise PlanError(f"{name} cannot be cut to {asked:g}", got=arch.pattern, legal=legal)
        if sum(kinds.get(unit, 1) for unit in set(arch.pattern)) == 0:
            raise PlanError("nothing would be left of the model", got=f"{kinds}", legal="at least one layer")

    def toward(self, arch: Architecture, share: float) -> Self:
        """The targets of an intermediate model, which has lost `share` of what `arch` loses on its way to these.

        Its sizes are multiples of what divides both ends, up to 16, so that it fits the layouts that these two fit.

        Args:
            arch: The original.
            share: Above 0; at 1 these targets, with every fraction as the number that it means for `arch`.
        """

        def between(whole: float, end: float) -> int:
            return ceil(whole - (whole - end) * share)

        def size_between(whole: int, end: int) -> int:
            step = gcd(whole, end, 16)
            return step * between(whole // step, end // step)

        values: dict[str, Any] = {}
        for name, end in self.sizes.items():
            groups = _GROUPS.get(name)
            whole: int = getattr(arch, name)
            if groups is None:
                values[name] = size_between(whole, end)
            else:  # in each of the groups that stay, as many
                now: int = getattr(arch, groups)
                then: int = self.sizes.get(groups, now)
                values[name] = between(whole // now, end // then) * size_between(now, then)
        if self.num_layers is not None:
            values["num_layers"] = between(len(arch.layers.blocks), self.num_layers)
        if self.num_sublayers is not None:
            values["num_sublayers"] = between(len(arch.pattern), self.num_sublayers)
        kinds = self.kinds(arch)
        values |= {n: between(arch.pattern.count(k), kinds[k]) for n, k in _LAYERS.items() if k in kinds}
        if (budget := _budget(arch, self)) is not None:
            name = "params" if self.params is not None else "memory"
            values[name] = float(between(budget.whole, budget.limit))
        return replace(self, **values)

    def divisor(self, arch: Architecture, name: str) -> int:
        """What the size `name` of a model cut from `arch` is a multiple of, where it is ours to choose."""
        if name == "mamba_num_heads":
            groups = self.mamba_num_groups or arch.mamba_num_groups
            return lcm(groups, self.mamba_heads_divisor or 1)
        asked = self.hidden_divisor if name == "hidden_size" else self.ffn_divisor
        return asked or (64 if getattr(arch, name) >= WIDE else 8)


@dataclass(frozen=True)
class _Budget:
    """A limit on one number of a model."""

    limit: int
    whole: int
    unit: str
    measure: Callable[[Architecture], int]


def resolve(arch: Architecture, targets: Targets, pattern: str) -> Architecture:
    """The architecture of the smaller model, once it is known which sub-layers stay; widths even in all layers.

    Without a budget, sizes are what is asked for. With one, this rule finds those that are not:

    - `hidden_size` takes the widths i/32 of the original, rounded down to its divisor; `ffn_hidden_size`, those of
      experts and shared experts and `mamba_num_heads` take the widths j/32 together, rounded down to theirs
      (`Targets.divisor`);
    - the two shrink in step: their factors differ by at most 4/3, unless one of them was asked for;
    - attention heads, groups, states, head channels, experts and depth stay as they are, unless asked for;
    - of all that are within 5% below the budget, the nearest wins; of equals, the widest hidden.

    Args:
        arch: The original.
        targets: Checked targets.
        pattern: The sub-layers that stay.

    Raises:
        PlanError: No candidate is within 5% below the budget; says what is reachable.
    """
    fixed = targets.sizes
    for name, groups in _GROUPS.items():
        if groups in fixed and name not in fixed:
            fixed[name] = getattr(arch, name) // getattr(arch, groups) * fixed[groups]
    windows = arch.attention_windows[: pattern.count(ATTENTION)]  # of which layers, is known when they are chosen
    shallow = replace(arch, pattern=pattern, layer_sizes={}, attention_windows=windows)
    budget = _budget(arch, targets)
    if budget is None:
        return replace(shallow, **fixed)

    sized = [(budget.measure(small), small) for small in _candidates(shallow, fixed, targets)]
    lowest = (1 - TOLERANCE) * budget.limit
    within = [(count, small.hidden_size, small) for count, small in sized if lowest <= count <= budget.limit]
    if within:
        return max(within, key=lambda entry: entry[:2])[2]

    counts = sorted(count for count, _ in sized)
    below = max((count for count in counts if count <= budget.limit), default=None)
    above = min((count for count in counts if count > budget.limit), default=None)
    nearby = " and ".join(f"{count:,}" for count in (below, above) if count is not None)
    raise PlanError(
        "no plan reaches the target",
        got=f"{budget.limit:,} {budget.unit}, of {budget.whole:,}",
        legal=f"{counts[0]:,} to {counts[-1]:,}, at most 5% below the target; nearest: {nearby}",
    )


def _budget(arch: Architecture, targets: Targets) -> _Budget | None:
    if targets.memory is not None:
        whole, load = memory_bytes(arch, targets.workload), targets.workload
        unit = f"bytes (16-bit weights, caches of {load.batch} x {load.context:,} tokens)"
        return _Budget(round(targets.memory), whole, unit, lambda small: memory_bytes(small, load))
    if targets.params is None:
        return None
    whole = arch.num_parameters(embedding=targets.embedding)
    limit = round(targets.params * whole) if targets.params <= 1 else round(targets.params)
    unit = f"parameters ({'with' if targets.embedding else 'without'} embeddings)"
    return _Budget(limit, whole, unit, lambda small: small.num_parameters(embedding=targets.embedding))


def _candidates(arch: Architecture, fixed: dict[str, int], targets: Targets) -> Iterator[Architecture]:
    inner = [name for name in _INNER if _KINDS[name] in arch.pattern and getattr(arch, name) and name not in fixed]
    hidden_steps = [GRID] if "hidden_size" in fixed else range(1, GRID + 1)
    inner_steps = range(1, GRID + 1) if inner else [GRID]
    in_step = "hidden_size" not in fixed and bool(inner)
    for i in hidden_steps:
        for j in inner_steps:
            if in_step and max(Fraction(i, j), Fraction(j, i)) > BALANCE:
                continue
            steps: dict[str, Any] = {"hidden_size": i} | dict.fromkeys(inner, j)
            sizes = {n: _round(getattr(arch, n), step, targets.divisor(arch, n)) for n, step in steps.items()}
            yield replace(arch, **(sizes | fixed))


def _round(size: int, step: int, unit: int) -> int:
    """`size * step/32`, rounded down to a multiple of `unit`, but at least one unit, and the size itself at 32/32."""
    return size if step == GRID else max(unit, size * step // GRID // unit * unit)
