"""The rows of a comparison: what the models are, their validation losses, and what each measure has found."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_ext.evaluation.measure import kinds
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.rows import Row, Unequal, differences, shown
from megatron_ext.models import cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.results import SETTINGS

SERVED = cost.Workload(batch=1, context=8192)


def rows(runs: Sequence[Run]) -> list[Row]:
    """What is compared."""
    return [*_facts(runs), *_validation(runs), *(row for kind in kinds() for row in kind.rows(runs))]


def _facts(runs: Sequence[Run]) -> list[Row]:
    if not all(isinstance(run.model, Architecture) for run in runs):
        return _facts_of_families(runs)
    archs = [run.architecture for run in runs]
    active = [arch.num_active_parameters() for arch in archs]
    parameters = [arch.num_parameters() for arch in archs]
    steps = [run.step or "-" for run in runs]
    found = [Row("step", steps)] if set(steps) != {"-"} else []
    found += [
        Row("layers", [arch.pattern for arch in archs]),
        Row("parameters", [f"{count:,}" for count in parameters]),
    ]
    if active != parameters:
        found.append(Row("parameters that a token uses", [f"{count:,}" for count in active]))

    def counted(what: str, count: Callable[[Any], str]) -> Row:
        return Row(what, [count(arch) for arch in archs])

    return [
        *found,
        Row("weights in 16 bits, MB", [f"{cost.BYTES * count / 1e6:,.1f}" for count in parameters]),
        counted(
            f"memory at {SERVED.context:,} tokens, MB", lambda arch: f"{cost.memory_bytes(arch, SERVED) / 1e6:,.1f}"
        ),
        counted("KV cache per token, bytes", lambda arch: f"{cost.kv_bytes_per_token(arch):,}"),
        counted("SSM states per sequence, bytes", lambda arch: f"{cost.state_bytes_per_sequence(arch):,}"),
    ]


def _facts_of_families(runs: Sequence[Run]) -> list[Row]:
    """Runs of which some are no layer pattern: whatever their models are described by."""
    described = [
        {"layers": run.model.pattern} if isinstance(run.model, Architecture) else run.model for run in runs
    ]  # fmt: skip
    names = dict.fromkeys(name for own in described for name in own if name != "num_parameters")
    steps = [Row("step", [run.step or "-" for run in runs])] if any(run.step for run in runs) else []
    return [
        *steps,
        *(Row(name.replace("_", " "), [str(own.get(name, "-")) for own in described]) for name in names),
        Row("parameters", [f"{run.parameters:,}" for run in runs]),
    ]


def _validation(runs: Sequence[Run]) -> list[Row]:
    """The loss on a validation split: named with its tokens, because a training measures on a part of it."""
    losses = [run.validation for run in runs]
    if not any(losses):
        return []
    unequal = validation_differences(runs)
    over = next(loss for loss in losses if loss).get(SETTINGS, {})
    size = "tokens" if "tokens" in over else "samples"
    ending = f", over {over[size]:,} {size}" if size in over and size not in unequal else ""
    if over and "source" not in unequal:
        ending += f" ({over['source']})"
    return [
        Row(f"validation {name.replace('_', ' ')}, {unit}{ending}", shown(losses, name, "{:.4f}"), unequal)
        for name, unit in validation_units(runs).items()
    ]


def validation_units(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics that validation reports, and their units."""
    units = {"loss": "nats per token"}
    for run in runs:
        units |= run.validation.get(SETTINGS, {}).get("units", {})
    return units


def validation_differences(runs: Sequence[Run]) -> Unequal:
    """In what the validation losses of runs differ, but for the step at which they were measured."""
    names = ("tokens", "samples", "source", "data", "split", "dtype")
    return differences([run.validation for run in runs], names)
