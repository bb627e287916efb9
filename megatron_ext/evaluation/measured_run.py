"""A run that is compared: its architecture, and what was measured of it by evaluation and by its own training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.errors import DataError
from megatron_ext.models.architecture import Architecture
from megatron_ext.reports import metrics_file, yaml_text
from megatron_ext.reports.results import CHECKPOINT, FILE, LOGGED, SETTINGS, VALIDATION, read_results


@dataclass(frozen=True)
class Run:
    """One checkpoint and what was measured of it.

    Attributes:
        name: For people; no other run has it.
        model: An `Architecture`, or what a model of another family is described by (`layout.described`).
        results: Of its `results.json`; `validation` also from the training's log.
        step: Which was measured, or is the newest.
    """

    name: str
    model: Architecture | Mapping[str, Any]
    results: dict[str, Any]
    step: str | None = None

    @classmethod
    def read(cls, path: Path, name: str) -> "Run":
        """From a run directory, or the `--save` of an evaluation.

        Raises:
            DataError: There is neither a checkpoint nor results.
            CheckpointError: The checkpoint is damaged.
        """
        results: dict[str, Any] = read_results(path)
        if VALIDATION not in results and "val_loss" in results:
            results[VALIDATION] = {"loss": results["val_loss"]}
        if (path / metrics_file.FILE).is_file() and (logged := _logged(path)):
            results = {VALIDATION: logged, **results}
        if "architecture" in (about := results.get(CHECKPOINT, {})):
            return cls(name, _model(about["architecture"]), results, about.get("step"))
        if not path.is_dir() or not (has_checkpoint(path) or (path / "metadata.json").is_file()):
            raise DataError("neither a checkpoint nor results", got=path, legal=f"a directory with one, or with {FILE}")
        step = layout.find(path).path
        return cls(name, _model(layout.described(step)), results, step.name)

    @property
    def parameters(self) -> int:
        """Parameters in all."""
        return self.model.num_parameters() if isinstance(self.model, Architecture) else self.model["num_parameters"]

    @property
    def architecture(self) -> Architecture:
        """The model of a run whose model is a layer pattern."""
        assert isinstance(self.model, Architecture)
        return self.model

    @property
    def validation(self) -> dict[str, Any]:
        """The validation loss with its settings; empty where it was not measured."""
        return self.results.get(VALIDATION, {})


def _model(described: Mapping[str, Any]) -> Architecture | Mapping[str, Any]:
    return described if "family" in described else Architecture.from_dict(dict(described))


def _logged(run: Path) -> dict[str, Any]:
    """The last validation of a training, which measures on so many batches of the split as it was told to."""
    validated = [
        step for step in metrics_file.read_metrics(run / metrics_file.FILE) if step.get("val_loss") is not None
    ]
    if not validated:
        return {}
    last = validated[-1]
    found = {"loss": last["val_loss"], "step": last["step"]}
    config = run / "config.yaml"
    if not config.is_file():
        return found
    try:
        content = yaml_text.read(config.read_text(encoding="utf-8")) or {}
        flags, units = content["flags"], content.get("units")
        samples = flags["eval_iters"] * flags["global_batch_size"]
        size = {"tokens": samples * flags["seq_length"]} if units is None else {"samples": samples, "units": units}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"the run's configuration cannot be read: {error!r}", got=config) from error
    found |= {name: last[f"val_{name}"] for name in units or () if f"val_{name}" in last}
    data = flags.get("valid_data_path") or flags.get("data_path")
    settings = {**size, "source": LOGGED, "data": data, "split": flags.get("split")}
    return {**found, SETTINGS: {**settings, "dtype": str(flags.get("params_dtype")).removeprefix("torch.")}}
