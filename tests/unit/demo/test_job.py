"""The demo asks a fair question, goes on where it stopped, and leaves other directories alone."""

import json
import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_ext.demo import job
from megatron_ext.errors import ConfigError

# In the place of Python: notes its command line and the signals that come, and takes a while to save at the first one.
LAUNCHER = f"""#!{sys.executable}
import pathlib, signal, sys, time

notes = pathlib.Path("notes")
notes.write_text(" ".join(sys.argv[1:4]) + "\\n")
came = []
def note(number, _):
    came.append(number)
    with notes.open("a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
if pathlib.Path("fails").exists():
    print("a warning\\n" * 50 + "error: the reason", file=sys.stderr)
    sys.exit(2)
pathlib.Path("ready").touch()
while not came:
    time.sleep(0.02)
time.sleep(0.5)
"""


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, job.Stage]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"vocab_divisor": 64}))
    return {str(stage.directory.relative_to(tmp_path)): stage for stage in job.stages(tmp_path)}


def value(stage: job.Stage, flag: str) -> str:
    return stage.flags[stage.flags.index(flag) + 1]


def test_the_control_differs_only_in_where_it_starts_and_what_it_learns_from(stages: dict[str, job.Stage]) -> None:
    distilled, scratch = stages["distilled"], stages["scratch"]
    start = distilled.flags.index("--data-path")
    own = {str(stage.directory) for stage in (distilled, scratch)}
    rest = [
        [word for word in stage.flags[stage.flags.index("--data-path") :] if word not in own]
        for stage in (distilled, scratch)
    ]
    assert rest[0] == rest[1]
    assert distilled.steps == scratch.steps
    assert distilled.flags[:start] == [
        "--distill-teacher",
        str(stages["teacher"].directory),
        "--pretrained-checkpoint",
        str(stages["pruned"].directory),
    ]
    assert value(scratch, "--preset") == str(stages["pruned"].directory)


def test_all_four_are_measured_on_the_same_split(stages: dict[str, job.Stage]) -> None:
    names = ("teacher", "pruned", "distilled", "scratch")
    measured = [stages[f"validation/{name}"] for name in names]
    assert [Path(value(stage, "--pretrained-checkpoint")).name for stage in measured] == list(names)
    assert len({value(stage, "--split") for stage in stages.values()}) == 1


def test_a_training_is_done_when_its_last_step_is_saved(stages: dict[str, job.Stage]) -> None:
    teacher = stages["teacher"]
    assert not teacher.done
    last = teacher.directory / f"iter_{teacher.steps:07d}"
    last.mkdir(parents=True)
    (teacher.directory / "metrics.jsonl").write_text("{}\n")
    assert not teacher.done
    (last / "metadata.json").write_text("{}")
    assert teacher.done


def test_a_directory_of_other_settings_or_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other, foreign = tmp_path / "other", tmp_path / "foreign"
    for directory in (other, foreign):
        directory.mkdir()
    (other / "settings.json").write_text(json.dumps(job.SETTINGS | {"batch": 1}))
    (foreign / "thesis.tex").write_text("done")
    for directory in (other, foreign):
        with pytest.raises(ConfigError, match="this directory"):
            job._claim(directory)
    job._claim(tmp_path / "new")
    job._claim(tmp_path / "new")
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What stands for Python, in an empty folder with a demo whose data are there."""
    monkeypatch.chdir(tmp_path)
    job._claim(Path("out"))
    (tmp_path / "out" / "data").mkdir()
    (tmp_path / "out" / "data" / "manifest.json").write_text('{"vocab_divisor": 64}')
    path = tmp_path / "python"
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    return str(path)


def in_its_own_session(launcher: str) -> None:
    os.setsid()
    job.sys = SimpleNamespace(executable=launcher)  # type: ignore[attr-defined]
    job.main(Namespace(out=Path("out")))


def test_ctrl_c_is_one_signal_to_what_runs(launcher: str, tmp_path: Path) -> None:
    """A terminal sends it to every process in its foreground, so to ours and not to the ranks a second time."""
    demo = multiprocessing.get_context("fork").Process(target=in_its_own_session, args=(launcher,))
    demo.start()
    while not (tmp_path / "ready").exists():
        assert demo.is_alive()
        time.sleep(0.02)
    assert demo.pid is not None
    os.killpg(demo.pid, signal.SIGINT)
    demo.join()
    assert demo.exitcode == 128 + signal.SIGINT
    assert (tmp_path / "notes").read_text().splitlines() == ["-m megatron_ext torchrun", "SIGTERM"]


def test_why_a_command_failed_is_shown(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher is ours, whose last line is what the rank that failed has said."""
    (tmp_path / "fails").touch()
    monkeypatch.setattr(job, "sys", SimpleNamespace(executable=launcher))
    with pytest.raises(job.DemoError, match=r"(?s)train the teacher: .* status 2.*error: the reason$") as error:
        job._run(job.stages(Path("out"))[0], Console(quiet=True))
    assert len(str(error.value).splitlines()) < 20
    assert (tmp_path / "notes").read_text() == "-m megatron_ext torchrun\n"
