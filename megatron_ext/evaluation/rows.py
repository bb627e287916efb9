"""A row of a comparison: what each run has of a quantity, and in what the ways of measuring it differ."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.evaluation.measured_run import Run
from megatron_ext.reports.results import SETTINGS, UNFINISHED

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
    said = [
        f"{SAID.get(name, name)} {' | '.join(_short(value) for value in own)}" if values else SAID.get(name, name)
        for name, own in unequal.items()
    ]
    return f" (unequal {'; '.join(said)})"


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def differences(results: Sequence[dict[str, Any]], names: Iterable[str] | None = None) -> Unequal:
    """The settings in which results differ.

    Args:
        results: Of each run; an empty one was not measured.
        names: The settings that matter; by default all that any of them has.
    """
    settings = [result.get(SETTINGS, {}) for result in results]
    names = list(dict.fromkeys(name for own in settings for name in own)) if names is None else names
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


def keys(runs: Sequence[Run], section: str) -> list[str]:
    """What any of the runs has in a section of its results."""
    return list(dict.fromkeys(key for run in runs for key in run.results.get(section, {})))


def shown(results: Sequence[dict[str, Any]], name: str, form: str) -> list[str]:
    """Numbers; "-" where nothing was measured, "nan" of what was not finite."""
    values = [result.get(name, "-") for result in results]
    return [value if value == "-" else "nan" if value is None else form.format(value) for value in values]
