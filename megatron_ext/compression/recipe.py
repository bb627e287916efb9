"""A compression as a file: its commands, which can be edited and replayed, on another model or in another directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.reports import yaml_text
from megatron_ext.workflow import Stage

NAME = "recipe.yaml"
HEAD = """\
# What `megatron-ext compress` runs, in order. Edit it, and replay it in a new directory:
#   megatron-ext compress [ANOTHER_MODEL] --recipe recipe.yaml --out NEW_DIRECTORY
# {model} and {out} stand for the model and the directory, steps for those of a training. A stage is done, and left
# out, when its output is in its directory.
"""
FIELDS = {"title": str, "words": list, "directory": str, "steps": int, "output": str, "parallel": bool}


@dataclass(frozen=True)
class Recipe:
    """Commands of a compression.

    Attributes:
        model: The Hugging Face model.
        launcher: What starts a parallel command; see `workflow.run`.
        stages: With `{model}` and `{out}` in their words and directories.
    """

    model: Path
    launcher: tuple[str, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, model: Path, out: Path, launcher: Sequence[str], stages: Sequence[Stage]) -> "Recipe":
        """That of stages which name a model and a directory."""
        return cls(
            model, tuple(launcher), tuple(_renamed(each, {str(out): "{out}", str(model): "{model}"}) for each in stages)
        )

    def at(self, model: Path, out: Path) -> list[Stage]:
        """The stages, for a model in a directory."""
        return [_renamed(stage, {"{out}": str(out), "{model}": str(model)}) for stage in self.stages]

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        stages = [
            {"title": stage.title, "words": list(stage.words), "directory": str(stage.directory), "steps": stage.steps,
             "output": stage.output, "parallel": stage.parallel}
            for stage in self.stages
        ]  # fmt: skip
        content = {"model": str(self.model), "launcher": list(self.launcher), "stages": stages}
        write_text(path, HEAD + yaml_text.write(content))

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read one.

        Raises:
            ConfigError: There is none.
            DataError: It is no recipe; says what is wrong with it.
        """
        try:
            content = yaml_text.read(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--recipe cannot be read", got=f"{path}: {error}", legal=f"a {NAME}") from error
        except yaml.YAMLError as error:
            raise DataError("the recipe is not YAML", got=f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or not content["stages"]:
            raise DataError("the recipe has no stages", got=path, legal="what `megatron-ext compress` wrote")
        launcher = content.get("launcher")
        if not isinstance(content.get("model"), str) or not _are_words(launcher):
            raise DataError(
                "the recipe names no model, or no launcher", got=path, legal="model: DIR, launcher: [WORD, ...]"
            )
        return cls(Path(content["model"]), tuple(launcher), tuple(_stage(each, path) for each in content["stages"]))


def _stage(entry: Any, path: Path) -> Stage:
    """One entry of the file."""
    if not isinstance(entry, dict) or entry.keys() != FIELDS.keys():
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise DataError(f"{path}: a stage has other fields", got=got, legal=", ".join(FIELDS))
    for name, kind in FIELDS.items():
        if type(entry[name]) is not kind or (kind is list and not _are_words(entry[name])):
            legal = "a list of texts (quote numbers)" if kind is list else f"a {kind.__name__}"
            raise DataError(f"{path}: {name} of the stage {entry['title']!r}", got=repr(entry[name]), legal=legal)
    return Stage(**entry | {"words": tuple(entry["words"]), "directory": Path(entry["directory"])})


def _are_words(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _renamed(stage: Stage, names: dict[str, str]) -> Stage:
    """A stage with other names of the model and the directory, where they are a word, its beginning or its value."""

    def rename(word: str) -> str:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        for old, new in names.items():
            if value == old or value.startswith(f"{old}/"):
                return flag + equals + new + value[len(old) :]
        return word

    words = tuple(map(rename, stage.words))
    return Stage(stage.title, words, Path(rename(str(stage.directory))), stage.steps, stage.output, stage.parallel)
