"""`results.json`: what was measured of one checkpoint, section by section."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.errors import ConfigError, DataError

FILE = "results.json"
CHECKPOINT = "checkpoint"


def read_results(directory: Path) -> dict[str, Any]:
    """What a directory's results say; nothing where there are none.

    Raises:
        DataError: They are damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"the results are not JSON: {error}", got=path) from error
    if not isinstance(found, dict):
        raise DataError("the results are not an object", got=path)
    return found


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write them, whole or not at all."""
    with replacing(directory / FILE) as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class Results:
    """The results of one step of a checkpoint, in its own directory or in another.

    Args:
        checkpoint: A checkpoint directory, or a step in one.
        directory: Where they go; by default beside the checkpoint's steps.

    Raises:
        ConfigError: The directory holds something else, or the results of another checkpoint.
        CheckpointError: There is no complete checkpoint.
        DataError: Results that are there are damaged.
    """

    def __init__(self, checkpoint: Path, directory: Path | None = None) -> None:
        step = layout.find(checkpoint)
        self.directory = directory or step.path.parent
        self.about: dict[str, Any] = {
            "path": str(step.path.parent.resolve()),
            "step": step.path.name,
            "fingerprint": layout.fingerprint(step.path),
            "architecture": layout.architecture(step.path).to_dict(),
        }
        there = read_results(self.directory).get(CHECKPOINT)
        if there is not None and there.get("path") != self.about["path"]:
            raise ConfigError(
                "the directory holds the results of another checkpoint", got=f"{self.directory}: {there.get('path')}",
                legal="--save another directory",
            )  # fmt: skip
        own = self.directory.resolve() == step.path.parent.resolve()
        if there is None and not own and self.directory.exists() and any(self.directory.iterdir()):
            raise ConfigError(
                "the directory is not empty and holds no results", got=self.directory, legal="a new directory"
            )

    def section(self, name: str) -> dict[str, Any]:
        """What was measured of this very step before, under a name; or nothing."""
        results = read_results(self.directory)
        same = results.get(CHECKPOINT, {}).get("fingerprint") == self.about["fingerprint"]
        return results.get(name, {}) if same else {}

    def add(self, **sections: Any) -> None:
        """Put sections in the place of those of their names.

        What an earlier step of the checkpoint measured is moved to `results-STEP.json` first.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        results = read_results(self.directory)
        there = results.get(CHECKPOINT, self.about)
        if there["fingerprint"] != self.about["fingerprint"]:
            (self.directory / FILE).rename(self.directory / f"results-{there['step']}.json")
            results = {}
        write_results(self.directory, {**results, CHECKPOINT: self.about, **sections})
