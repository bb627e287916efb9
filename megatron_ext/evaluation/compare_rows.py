"""The rows of a comparison: what each run has of a quantity, and in what the ways of measuring it differ."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.evaluation.measured_run import Run
from megatron_ext.models import cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports.results import SETTINGS, UNFINISHED

SERVED = cost.Workload(batch=1, context=8192)
COUNTED = ("samples", "num_fewshot", "version", "requests", "cut", "samples_file", SETTINGS)  # beside a task's metrics
SAID = {"num_fewshot": "few-shot", "stride": "stride", "ranks": "ranks", "batch_size": "batch"}
Unequal = dict[str, list[Any]]


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        what: Its name and unit.
        values: Of each run; "-" where it was not measured.
        unequal: Settings in which the measurements differ, and their values; None where it was not measured.
    """

    what: str
    values: list[str]
    unequal: Unequal = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called in a table: with what is unequal."""
        return self.what + note(self.unequal)


def note(unequal: Unequal, values: bool = True) -> str:
    """What is to be said of measurements that differ; nothing where none do."""
    if not unequal:
        return ""
    told = [
        f"{SAID.get(name, name)} {' | '.join(_short(value) for value in own)}" if values else SAID.get(name, name)
        for name, own in unequal.items()
    ]
    return f" (unequal {'; '.join(told)})"


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def differences(results: Sequence[dict[str, Any]], names: Iterable[str] | None = None) -> Unequal:
    """The settings in which results differ.

    Args:
        results: Of each run; an empty one was not measured.
        names: The settings that matter; by default all that any of them has.
    """
    told = [result.get(SETTINGS, {}) for result in results]
    names = list(dict.fromkeys(name for own in told for name in own)) if names is None else names
    found: Unequal = {}
    for name in names:
        values = [_value(result, name) for result in results]
        if len({json.dumps(value, sort_keys=True) for value in values if value is not None}) > 1:
            found[name] = values
    if any(UNFINISHED in result for result in results):
        found["files"] = [len(result["files"]) if result else None for result in results]
    return found


def _value(result: dict[str, Any], name: str) -> Any:
    """A setting of a measurement: None where there is no measurement, a question mark where it does not say."""
    if not result:
        return None
    value = result.get(SETTINGS, {}).get(name, "?")
    return "none" if value is None else value


def rows(runs: Sequence[Run]) -> list[Row]:
    """What is compared."""
    found = [*_facts(runs), *_validation(runs), *_text(runs), *_tasks(runs)]
    for suite in _keys(runs, "synthetic"):
        for length in sorted({int(n) for run in runs for n in run.results.get("synthetic", {}).get(suite, {})}):
            cells = [run.results.get("synthetic", {}).get(suite, {}).get(str(length), {}) for run in runs]
            values = _shown(cells, "accuracy", "{:.0%}")
            found.append(Row(f"{suite} at {length:,}", values, differences(cells)))
    for what in ("prefill", "decode"):
        for length in sorted(map(int, _keys(runs, "speed"))):
            cells = [run.results.get("speed", {}).get(str(length), {}) for run in runs]
            values = _shown(cells, f"{what}_tokens_per_second", "{:,.1f}")
            found.append(Row(f"{what} at {length:,}, tokens/s", values, differences(cells)))
    return found


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
        Row(f"validation {name.replace('_', ' ')}, {unit}{ending}", _shown(losses, name, "{:.4f}"), unequal)
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


def _text(runs: Sequence[Run]) -> list[Row]:
    texts = [run.results.get("text", {}) for run in runs]
    if not any(texts):
        return []
    values = _shown(texts, "bits_per_byte", "{:.4f}"), _shown(texts, "loss", "{:.4f}")
    return [
        Row("text: bits per byte", values[0], text_differences(runs)),
        Row("text: loss, nats per token", values[1], differences(texts)),  # in which the tokenizer has a part
    ]


def text_differences(runs: Sequence[Run]) -> Unequal:
    """In what the texts of runs were measured differently, as far as bits per byte depend on it."""
    return differences([run.results.get("text", {}) for run in runs], ("texts", "window", "stride", "dtype"))


def _tasks(runs: Sequence[Run]) -> list[Row]:
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for task, metrics in run.results.get("tasks", {}).items():
            for metric in metrics:
                if metric not in COUNTED and "_stderr" not in metric:
                    found[task, metric] = None
    unequal = {task: task_differences(runs, task) for task, _ in found}
    return [
        Row(f"{task}: {metric}", _shown(task_results(runs, task), metric, "{:.4f}"), unequal[task])
        for task, metric in found
    ]


def task_results(runs: Sequence[Run], task: str) -> list[dict[str, Any]]:
    """What each run has of a task; an empty object where it was not measured."""
    return [run.results.get("tasks", {}).get(task, {}) for run in runs]


def task_differences(runs: Sequence[Run], task: str) -> Unequal:
    """In what a task was asked differently. A window that no request was longer than made no difference."""
    results = task_results(runs, task)
    names = ["num_fewshot", "limit", "chat", "generation", "dtype", "tokenizer"]
    if any(result.get("cut", 1) for result in results if result):
        names.append("window")
    return differences(results, names)


def _keys(runs: Sequence[Run], section: str) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.results.get(section, {})))


def _shown(results: Sequence[dict[str, Any]], name: str, form: str) -> list[str]:
    """Numbers; "-" where nothing was measured, "nan" of what was not finite."""
    values = [result.get(name, "-") for result in results]
    return [value if value == "-" else "nan" if value is None else form.format(value) for value in values]
