"""A place is found unusable before the work, two jobs do not write into one, and a killed job blocks no later one."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.checkpoint import outputs
from megatron_ext.checkpoint.atomic import check_new, fresh_directory
from megatron_ext.checkpoint.outputs import check_writable, contents, hold_new, hold_run, release_new
from megatron_ext.errors import CheckpointError, ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from megatron_ext.checkpoint import outputs
getattr(outputs, sys.argv[1])(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


def other_job(name: str, path: Path) -> subprocess.Popen[str]:
    """Another process that holds `path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, name, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "some" / "new")
    check_new(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="--out: nothing can be written there: not a directory"):
        check_writable(tmp_path / "file" / "new", "--out")
    with pytest.raises(ConfigError, match="--save: nothing can be written there"):
        check_writable(Path("/proc/new"))
    with pytest.raises(CheckpointError, match="exists already"):
        check_new(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("hold", [hold_run, hold_new])
def test_two_jobs_do_not_write_into_one_place_and_a_killed_one_blocks_none(tmp_path: Path, hold) -> None:
    path = tmp_path / "run"
    process = other_job(hold.__name__, path)
    try:
        with pytest.raises(ConfigError, match=f"another job writes there\\n.*process {process.pid} on "):
            hold(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.rglob("*lock")), "a killed job leaves its file"
    hold(path)
    hold(path)  # once more in one process is nothing new
    second = subprocess.run(
        [sys.executable, "-c", HOLDER, hold.__name__, path], capture_output=True, text=True, check=False
    )
    assert "another job writes there" in second.stderr
    for lock in list(outputs._held):
        outputs._release(lock)
    assert not list(tmp_path.rglob("*lock"))


def test_leftovers_of_the_same_output_go_and_nothing_else(tmp_path: Path) -> None:
    mine, left = tmp_path / ".out.backup", tmp_path / ".out.abcd1234.partial"
    other = tmp_path / ".out-two.abcd1234.partial"
    for directory in (mine, left, other):
        directory.mkdir()
        (directory / "file").write_text("x")
    with fresh_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, other.name, "out"])


def test_leftovers_of_what_lies_beside_an_output_go_too(tmp_path: Path) -> None:
    names = [
        "..out.scores-1a2b.safetensors.abcd1234.partial",
        "..out.round-1.abcd1234.partial",
        ".out.abcd1234.partial",
    ]
    others = [".out.scores-1a2b.safetensors", "..out-two.round-1.abcd1234.partial", "..out.else.abcd1234.partial"]
    for name in (*names, *others):
        (tmp_path / name).write_text("x")
    hold_new(tmp_path / "out", ("scores-*.safetensors", "round-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".out.lock"])
    release_new(tmp_path / "out")


def test_leftovers_in_a_run_go_when_no_process_of_the_job_can_be_writing_them(tmp_path: Path) -> None:
    old, young, mine = (tmp_path / name for name in (".metrics.jsonl.a1.partial", ".config.yaml.b2.partial", ".notes"))
    for file in (old, young, mine):
        file.write_text("x")
    os.utime(old, (time.time() - 3600,) * 2)
    own = tmp_path / f".one.safetensors.abcd1234{outputs.PARTIAL}", tmp_path / f".abcd1234{outputs.PARTIAL}"
    for file in own:
        file.write_text("x")
    hold_run(tmp_path, ["*.safetensors"])
    assert not any(file.exists() for file in own)
    assert [path.name for path in contents(tmp_path)] == [".notes"]
    assert not old.exists()
    assert young.exists()
    outputs._release(tmp_path / ".lock")
    release_new(tmp_path / "never")  # what is not held is nothing to give up
