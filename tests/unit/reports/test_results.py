"""What was measured is never lost, and never mixed with what was measured in another way."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.errors import ConfigError
from megatron_ext.reports.results import Results, read_results

ARCHITECTURE = {"hidden_size": 8}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two steps, of which nothing is looked at."""
    run = tmp_path / "run"
    for step in ("iter_0000002", "iter_0000004"):
        (run / step).mkdir(parents=True)
        (run / step / ".metadata").write_text(step)
    monkeypatch.setattr(layout, "find", lambda path: SimpleNamespace(path=Path(path)))
    monkeypatch.setattr(layout, "described", lambda step: ARCHITECTURE)
    return run


def task(acc: float, shots: int, **more: Any) -> dict[str, Any]:
    return {"acc": acc, "settings": {"num_fewshot": shots, "generation": {"until": ("a",)}}, **more}


def test_results_join_those_that_are_there(checkpoint: Path, tmp_path: Path) -> None:
    results = Results(checkpoint / "iter_0000004")
    results.add(tasks={"quiz": task(0.1, 0)})
    results.add(tasks={"exam": task(0.2, 0)}, val_loss=3.0)
    results.add(tasks={"quiz": task(0.3, 5)})  # in another way
    results.add(tasks={"exam": task(0.25, 0)})  # in the same
    found = read_results(checkpoint)
    assert {name: own["acc"] for name, own in found["tasks"].items()} == {"quiz": 0.3, "exam": 0.25}
    assert {place: [own["acc"] for own in all_] for place, all_ in found["earlier"].items()} == {"tasks/quiz": [0.1]}
    assert found["val_loss"] == 3.0
    results.add(tasks={"quiz": task(0.11, 0)})  # as the first once more
    found = read_results(checkpoint)
    assert found["tasks"]["quiz"]["acc"] == 0.11
    assert [own["acc"] for own in found["earlier"]["tasks/quiz"]] == [0.3]


def test_what_is_unfinished_does_not_take_the_place_of_what_is_not(checkpoint: Path) -> None:
    results = Results(checkpoint / "iter_0000004")
    results.add(text=task(1.0, 0))
    results.add(text=task(0.5, 0, unfinished=["b.txt"]))
    assert [own["acc"] for own in read_results(checkpoint)["earlier"]["text"]] == [1.0]
    results.add(text=task(0.6, 0, unfinished=["c.txt"]))
    assert [own["acc"] for own in read_results(checkpoint)["earlier"]["text"]] == [1.0]
    results.add(text=task(0.9, 0))
    assert "earlier" not in read_results(checkpoint)


def test_each_step_keeps_its_own(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (Results(checkpoint / f"iter_000000{n}", tmp_path / "out") for n in (2, 4))
    first.add(val_loss=2.0)
    second.add(val_loss=4.0)
    first.add(tasks={"quiz": task(0.2, 0)})  # back to the first
    assert read_results(tmp_path / "out")["val_loss"] == 2.0
    second.add(tasks={"quiz": task(0.4, 0)})
    files = ("results.json", "results-iter_0000002.json")
    assert [read_results(tmp_path / "out", file)["val_loss"] for file in files] == [4.0, 2.0]
    assert first.section("tasks")["quiz"]["acc"] == 0.2
    # A step of this name that was trained anew.
    (checkpoint / "iter_0000002" / ".metadata").write_text("anew")
    anew = Results(checkpoint / "iter_0000002", tmp_path / "out")
    assert anew.section("tasks") == {}
    anew.add(val_loss=2.5)
    second.add(val_loss=4.5)
    losses = {path.name: json.loads(path.read_text())["val_loss"] for path in (tmp_path / "out").iterdir()}
    assert sorted(losses.values()) == [2.0, 2.5, 4.5]


def test_what_is_not_finite_is_null(checkpoint: Path) -> None:
    results = Results(checkpoint / "iter_0000004")
    results.add(text=task(math.nan, 0, files={"a": [math.inf, 1.0]}), val_loss=math.nan)
    found = read_results(checkpoint)
    assert (found["text"]["acc"], found["text"]["files"]["a"], found["val_loss"]) == (None, [None, 1.0], None)


def test_a_run_that_was_moved_has_its_results(checkpoint: Path, tmp_path: Path) -> None:
    Results(checkpoint / "iter_0000004").add(val_loss=1.0)
    Results(checkpoint / "iter_0000004", tmp_path / "out").add(val_loss=1.0)
    moved = checkpoint.rename(tmp_path / "moved")
    for directory in (None, tmp_path / "out"):
        results = Results(moved / "iter_0000004", directory)
        assert results.section("val_loss") == 1.0
    (moved / "iter_0000004" / ".metadata").write_text("of another run")
    with pytest.raises(ConfigError, match="another checkpoint"):
        Results(moved / "iter_0000004", tmp_path / "out")


@pytest.mark.parametrize("place", ["/proc/results", "file/results"])
def test_where_nothing_can_be_written_is_found_at_once(checkpoint: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written there"):
        Results(checkpoint / "iter_0000004", tmp_path / place)


def test_jobs_that_measure_at_once_lose_nothing_of_each_other(checkpoint: Path) -> None:
    jobs, rows = 4, 8
    children = []
    for job in range(jobs):
        if (child := os.fork()) == 0:
            results = Results(checkpoint / "iter_0000004")
            for row in range(rows):
                results.add(tasks={f"quiz-{job}-{row}": task(row, 0)})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * jobs
    assert len(read_results(checkpoint)["tasks"]) == jobs * rows
    assert [path.name for path in checkpoint.iterdir() if path.is_file()] == ["results.json"]
