"""The demo asks a fair question, goes on where it stopped, and leaves other directories alone."""

import json
from pathlib import Path

import pytest

from megatron_ext.demo import job
from megatron_ext.errors import ConfigError
from megatron_ext.workflow import Stage


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Stage]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"vocab_divisor": 64}))
    return {str(stage.directory.relative_to(tmp_path)): stage for stage in job.stages(tmp_path)}


def value(stage: Stage, flag: str) -> str:
    return stage.words[stage.words.index(flag) + 1]


def test_the_control_differs_only_in_where_it_starts_and_what_it_learns_from(stages: dict[str, Stage]) -> None:
    distilled, scratch = stages["distilled"], stages["scratch"]
    start = distilled.words.index("--data-path")
    own = {str(stage.directory) for stage in (distilled, scratch)}
    rest = [
        [word for word in stage.words[stage.words.index("--data-path") :] if word not in own]
        for stage in (distilled, scratch)
    ]
    assert rest[0] == rest[1]
    assert distilled.steps == scratch.steps
    assert distilled.words[:start] == (
        "distill",
        "--distill-teacher",
        str(stages["teacher"].directory),
        "--pretrained-checkpoint",
        str(stages["pruned"].directory),
    )
    assert value(scratch, "--preset") == str(stages["pruned"].directory)


def test_all_four_are_measured_on_the_same_split(stages: dict[str, Stage]) -> None:
    names = ("teacher", "pruned", "distilled", "scratch")
    measured = [stages[f"validation/{name}"] for name in names]
    assert [Path(value(stage, "--pretrained-checkpoint")).name for stage in measured] == list(names)
    assert len({value(stage, "--split") for stage in stages.values()}) == 1


def test_a_directory_of_other_settings_or_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other, foreign = tmp_path / "other", tmp_path / "foreign"
    for directory in (other, foreign):
        directory.mkdir()
    (other / "settings.json").write_text(json.dumps(job.SETTINGS | {"batch": 1}))
    (foreign / "thesis.tex").write_text("done")
    for directory in (other, foreign):
        with pytest.raises(ConfigError, match="this directory"):
            job._claim(directory, job.SETTINGS)
    job._claim(tmp_path / "new", job.SETTINGS)
    job._claim(tmp_path / "new", job.SETTINGS)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
