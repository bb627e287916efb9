"""What can be measured of a checkpoint: a registry, to which installed packages add by entry points.

A kind of measure is its flags, its section of `results.json`, and its rows and pictures in a comparison. It is
measured piece by piece: a file, a task, a length at a time.
"""

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.rows import Row
from megatron_ext.reports.results import Results

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

GROUP = "megatron_ext.measures"
"""The entry points by which another package adds a measure: NAME = "module:KIND"."""

OURS = ("text", "tasks", "synthetic", "speed", "images")

Panel = tuple[str, Callable[[Any, Sequence[Run]], None]]
"""A title, and what draws runs into matplotlib's axes."""


@dataclass(frozen=True)
class Evaluation:
    """What all measures of an evaluation have in common.

    Attributes:
        args: The command line.
        results: Where results go.
        tokenizer: transformers'.
        longest: Tokens that the model reads at most.
        settings: Of the evaluation as a whole, which each result repeats under `settings`.
    """

    args: argparse.Namespace
    results: Results
    tokenizer: Any
    longest: int
    settings: dict[str, Any]


class Measure(ABC):
    """Something that is measured of a model.

    Attributes:
        name: The section of `results.json`.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Measure, on all ranks; each part of the section as it is there."""

    @abstractmethod
    def say(self, found: dict[str, Any]) -> str:
        """A part of the section, for people."""

    def finish(self, results: Results) -> None:  # noqa: B027 - most have nothing to do
        """Draw or write what belongs to the whole section, on the first rank, when all of it is there."""


@dataclass(frozen=True)
class MeasureKind:
    """A kind of measure.

    Attributes:
        add_arguments: Adds its flags to those of `megatron-ext evaluate`; of what another command measures there are
            none.
        asked: Whether a command line asks for it; raises `ConfigError` for flags that are wrong or without effect.
        build: Makes it, or says what is wrong before any model is built; None of what another command measures.
        rows: Of a comparison of runs.
        panels: Of the picture of a comparison.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    asked: Callable[[argparse.Namespace], bool] = lambda args: False
    build: Callable[[Evaluation], Measure] | None = None
    rows: Callable[[Sequence[Run]], list[Row]] = lambda runs: []
    panels: Callable[[Sequence[Run]], list[Panel]] = lambda runs: []


@cache
def kinds() -> tuple[MeasureKind, ...]:
    """All of them: ours, and those of installed packages in the order of their names."""
    ours = [importlib.import_module(f"megatron_ext.evaluation.measures.{name}").KIND for name in OURS]
    others = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return *ours, *(entry.load() for entry in others)
