"""`results.json`: what was measured of one checkpoint, section by section, and in which way.

A result is an object with `settings`: all that it depends on beside the model's step, such as a window, a number of
examples, the tokenizer. Measured again in the same way, it takes the place of the one before; measured in another way,
the one before is kept under `earlier`, by the place where it was (`tasks/hellaswag`).
"""

import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.checkpoint.outputs import alone, check_writable, contents
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.reports.metrics_file import finite

FILE = "results.json"
CHECKPOINT, EARLIER, SETTINGS, UNFINISHED = "checkpoint", "earlier", "settings", "unfinished"
VALIDATION = "validation"
WHOLE, LOGGED = "--skip-train", "training's log"  # where a validation loss comes from


def read_results(directory: Path, file: str = FILE) -> dict[str, Any]:
    """What a directory's results say; nothing where there are none.

    Raises:
        DataError: They are damaged.
    """
    path = directory / file
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
    """Write them, whole or not at all; what is not finite, as the loss of a model that diverged is, as null."""
    with atomic_write(directory / FILE) as temporary:
        temporary.write_text(json.dumps(finite(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


class Results:
    """The results of one step of a checkpoint, in its own directory or in another.

    Args:
        checkpoint: A checkpoint directory, or a step in one.
        directory: Where they go; by default beside the checkpoint's steps.
        claimed: The directory is known to be this job's, whatever else lies in it.
        about: What is said of weights that are no checkpoint: `path`, `step`, `fingerprint` and `architecture`. Their
            results have a directory of their own.

    Raises:
        ConfigError: The directory holds something else, or the results of another checkpoint, or cannot be written.
        CheckpointError: There is no complete checkpoint.
        DataError: Results that are there are damaged.
    """

    def __init__(
        self, checkpoint: Path, directory: Path | None = None, claimed: bool = False,
        about: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        step = layout.find(checkpoint).path if about is None else checkpoint
        home = step.parent
        self.directory = directory or home
        self.about = _about(step) if about is None else about
        there = read_results(self.directory).get(CHECKPOINT)
        own = about is None and self.directory.resolve() == home.resolve()  # a run may have been moved
        known = there is None or any(there.get(name) == self.about[name] for name in ("path", "fingerprint"))
        if not (own or known):
            raise ConfigError(
                "the directory holds the results of another checkpoint",
                got=f"{self.directory}: {(there or {}).get('path')}",
                legal="--save another directory",
            )
        if there is None and not (own or claimed) and self.directory.is_dir() and contents(self.directory):
            raise ConfigError(
                "the directory is not empty and holds no results", got=self.directory, legal="a new directory"
            )
        check_writable(self.directory, "--save")

    def section(self, name: str) -> dict[str, Any]:
        """What was measured of this very step before, under a name; or nothing."""
        return self._before().get(name, {})

    def add(self, **sections: Any) -> None:
        """Add what was measured to what is there, which other jobs may do at the same time.

        Args:
            sections: By name a result, or results by their names; a result has `settings`. What is no object takes the
                place of what has its name. A result with `unfinished` does not take the place of a finished one.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with alone(self.directory / FILE):
            self._add(sections)

    def _add(self, sections: dict[str, Any]) -> None:
        results = self._before()
        there = read_results(self.directory).get(CHECKPOINT, self.about)
        if there["fingerprint"] != self.about["fingerprint"]:
            (self.directory / FILE).rename(self.directory / self._aside(there))
        earlier: dict[str, list[Any]] = results.pop(EARLIER, {})
        for name, new in sections.items():
            results[name] = _merged(results.get(name), new, name, earlier)
        kept = {place: found for place, found in earlier.items() if found}
        write_results(self.directory, {CHECKPOINT: self.about, **results, **({EARLIER: kept} if kept else {})})
        aside = self.directory / self._aside(self.about)  # which is in it now
        if read_results(self.directory, aside.name).get(CHECKPOINT, {}).get("fingerprint") == self.about["fingerprint"]:
            aside.unlink()

    def _before(self) -> dict[str, Any]:
        """All results of this very step."""
        for file in (FILE, self._aside(self.about)):
            found = read_results(self.directory, file)
            if found.get(CHECKPOINT, {}).get("fingerprint") == self.about["fingerprint"]:
                return {name: value for name, value in found.items() if name != CHECKPOINT}
        found = read_results(self.directory)
        return found if CHECKPOINT not in found else {}

    def _aside(self, about: dict[str, Any]) -> str:
        """Where results of a step are while those of another are in `results.json`; two trainings may have one step."""
        plain = f"results-{about['step']}.json"
        there = read_results(self.directory, plain).get(CHECKPOINT, about)
        same = there.get("fingerprint") == about["fingerprint"]
        return plain if same else f"results-{about['step']}-{about['fingerprint'][:12]}.json"


def _about(step: Path) -> dict[str, Any]:
    return {
        "path": str(step.parent.resolve()),
        "step": step.name,
        "fingerprint": layout.fingerprint(step),
        "architecture": layout.described(step),
    }


def _merged(old: Any, new: Any, place: str, earlier: dict[str, list[Any]]) -> Any:
    """What becomes of an entry; what `new` displaces joins `earlier`."""
    if not isinstance(new, dict):
        return new
    if SETTINGS not in new:
        old = old if isinstance(old, dict) else {}
        return {**old, **{name: _merged(old.get(name), own, f"{place}/{name}", earlier) for name, own in new.items()}}
    others = [found for found in earlier.get(place, []) if UNFINISHED in new or not _alike(found, new)]
    if old is not None and (not _alike(old, new) or (UNFINISHED in new and UNFINISHED not in old)):
        others.append(old)
    earlier[place] = others
    return new


def _alike(one: Any, other: dict[str, Any]) -> bool:
    """Whether two results were measured in one way."""
    return isinstance(one, dict) and one.get(SETTINGS) == json.loads(json.dumps(finite(other[SETTINGS])))
