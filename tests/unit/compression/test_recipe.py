from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.compression.recipe import Recipe
from megatron_ext.compression.stages import Request, stages
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.workflow import torchrun

MODEL, OUT = Path("models/llama"), Path("runs/half")
STAGES = stages(Request(MODEL, OUT, 0.5, 10**6, (), (), "95,5,0", 1024, 4, 10**8, verify=True, flags=("--bf16",)))


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.of(MODEL, OUT, torchrun(2), STAGES)


def test_what_is_written_is_read(recipe: Recipe, tmp_path: Path) -> None:
    recipe.write(tmp_path / "recipe.yaml")
    read = Recipe.read(tmp_path / "recipe.yaml")
    assert read == recipe
    assert read.at(MODEL, OUT) == STAGES


def test_another_model_goes_into_another_directory(recipe: Recipe) -> None:
    text = " ".join(word for stage in recipe.at(Path("/m/qwen"), Path("/r/q")) for word in stage.words)
    assert "models/llama" not in text
    assert "runs/half" not in text
    assert "--to megatron /m/qwen /r/q/original --verify" in text
    assert "--data-path /r/q/data/text_document" in text


def test_only_whole_names_are_replaced() -> None:
    stage = replace(STAGES[0], words=("data", "runs/half-done", "runs/half", "--out=runs/half/x", "models/llama.txt"))
    (renamed,) = Recipe.of(MODEL, OUT, ("w",), [stage]).stages
    assert renamed.words == ("data", "runs/half-done", "{out}", "--out={out}/x", "models/llama.txt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": []}, "has no stages"),
        ({"model": None}, "names no model"),
        ({"launcher": ["torchrun", 2]}, "no launcher"),
        ({"stages": ["convert"]}, "other fields"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Recipe, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.write(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        Recipe.read(path)


def test_a_number_among_words_is_named(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.write(path)
    path.write_text(path.read_text().replace("'1024'", "1024"))
    with pytest.raises(DataError, match="words of the stage 'measure original'") as error:
        Recipe.read(path)
    assert "quote numbers" in str(error.value)


def test_no_recipe_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "text").write_text("*: [")
    with pytest.raises(DataError, match="not YAML"):
        Recipe.read(tmp_path / "text")
