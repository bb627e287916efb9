"""A workflow goes on where it stopped, and hands signals and reasons on."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_ext import workflow
from megatron_ext.workflow import Stage, StageError, Stopped

# In the place of Python: notes its command line and the signals that come, and takes a while to save at the first one.
LAUNCHER = f"""#!{sys.executable}
import pathlib, signal, sys, time

notes = pathlib.Path("notes")
notes.write_text(" ".join(sys.argv[1:]) + "\\n")
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


QUIET = Console(quiet=True)


def test_a_training_is_done_when_its_last_step_is_saved(tmp_path: Path) -> None:
    stage = Stage("train", ("pretrain",), tmp_path, steps=240)
    assert not stage.done
    last = tmp_path / "iter_0000240"
    last.mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert not stage.done
    (last / "metadata.json").write_text("{}")
    assert stage.done


def test_another_command_is_done_when_its_proof_is_there(tmp_path: Path) -> None:
    measured, converted = (Stage("", (), tmp_path / "it", output=output) for output in ("results.json", ""))
    assert not measured.done
    assert not converted.done
    (tmp_path / "it").mkdir()
    assert not measured.done
    assert converted.done


def test_a_command_is_shown_as_it_is_typed(tmp_path: Path) -> None:
    words = ("pretrain", "--hybrid-layer-pattern=M*")
    launcher = workflow.torchrun(2)
    typed = "megatron-ext torchrun --standalone --nproc-per-node 2 -m megatron_ext pretrain"
    assert workflow.command(Stage("", words, tmp_path), launcher) == f"{typed} '--hybrid-layer-pattern=M*'"
    alone = workflow.command(Stage("", words, tmp_path, parallel=False), launcher)
    assert alone == "megatron-ext pretrain '--hybrid-layer-pattern=M*'"


def test_what_is_done_is_not_done_again_and_its_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = tmp_path / "program"
    marked.write_text(f"#!{sys.executable}\nimport pathlib, sys\npathlib.Path(sys.argv[-1]).mkdir()\n")
    marked.chmod(0o755)
    monkeypatch.setattr(workflow, "sys", SimpleNamespace(executable=str(marked)))
    stages = [Stage(name, (str(tmp_path / name),), tmp_path / name, output="", parallel=False) for name in ("a", "b")]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    first = workflow.run(stages[:1], tmp_path, (), QUIET)
    assert first["a"] > 0
    again = workflow.run(stages, tmp_path, (), QUIET)
    assert again["a"] == first["a"]
    assert json.loads((tmp_path / "seconds.json").read_text()) == again
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What stands for Python, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "python"
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    return str(path)


STAGE = Stage("train the teacher", ("pretrain", "--preset", "tiny-hybrid"), Path("teacher"), steps=2)


def in_its_own_session(launcher: str) -> None:
    os.setsid()
    workflow.sys = SimpleNamespace(executable=launcher)  # type: ignore[attr-defined]
    workflow.run([STAGE], Path("out"), workflow.torchrun(2), QUIET)


def test_ctrl_c_is_one_signal_to_what_runs(launcher: str, tmp_path: Path) -> None:
    """A terminal sends it to every process in its foreground, so to ours and not to the ranks a second time."""
    run = multiprocessing.get_context("fork").Process(target=in_its_own_session, args=(launcher,))
    run.start()
    while not (tmp_path / "ready").exists():
        assert run.is_alive()
        time.sleep(0.02)
    assert run.pid is not None
    os.killpg(run.pid, signal.SIGINT)
    run.join()
    assert run.exitcode == 128 + signal.SIGINT
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[0].startswith("-m megatron_ext torchrun --standalone --nproc-per-node 2 -m megatron_ext pretrain")
    assert notes[1:] == ["SIGTERM"]


@pytest.mark.parametrize("status", [0, 143])
def test_a_command_that_somebody_else_has_stopped_is_not_done(tmp_path: Path, status: int) -> None:
    """As SLURM does, which tells the ranks themselves: a training saves and ends well, without its last step."""
    stage = Stage("train", ("-c", f"exit {status}"), tmp_path / "run", steps=2)
    with pytest.raises(Stopped) as stopped:
        workflow._run(stage, tmp_path, ("sh",), QUIET)
    assert stopped.value.code == 143


def test_why_a_command_failed_is_shown(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher is ours, whose last line is what the rank that failed has said."""
    (tmp_path / "fails").touch()
    monkeypatch.setattr(workflow, "sys", SimpleNamespace(executable=launcher))
    with pytest.raises(StageError, match=r"(?s)train the teacher: .* status 2.*error: the reason$") as error:
        workflow._run(STAGE, Path("out"), workflow.torchrun(2), QUIET)
    assert len(str(error.value).splitlines()) < 20
    assert len((tmp_path / "notes").read_text().splitlines()) == 1
