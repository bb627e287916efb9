"""A package that is not ours adds a job by an entry point; a broken one is told, and breaks nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
from workspace import ROOT

SCRIPT = Path(sys.executable).with_name("megatron-ext")
MAIN = "\n\ndef main(args):\n    run_job(JOB, args.words)\n"
FLAGS = ["--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "4", "--lr", "1e-2", "--dry-run"]


def install(folder: Path, package: str, entry_points: str) -> None:
    """What pip leaves on the path for a package of these entry points."""
    information = folder / f"{package}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[megatron_ext.jobs]\n{entry_points}\n")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the path with three packages: a whole system, nothing that works, and names that are ours."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "outside_wing.py").write_text((ROOT / "tests/support/toy_wing.py").read_text() + MAIN)
    install(folder, "outside", "toy = outside_wing")
    (folder / "empty.py").write_text("")
    (folder / "needs.py").write_text("import no_such_thing\n")
    install(folder, "broken", "gone = no_such_wing\nneedy = needs\nempty = empty")
    (folder / "mine.py").write_text("def main(args):\n    print('not ours', args.words)\n")
    install(folder, "greedy", "presets = mine\ntorchrun = mine")
    return folder


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return fork_server.run([SCRIPT, *words], cwd=path, environment=_on_the_path(path))


def start(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """By `python -m` and a fresh interpreter."""
    command, environment = [sys.executable, "-m", "megatron_ext", *words], os.environ | _on_the_path(path)
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, check=False, timeout=120)


def _on_the_path(path: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}


@pytest.mark.parametrize("run", [run, start], ids=["megatron-ext", "python -m megatron_ext"])
def test_a_job_of_another_package_runs(path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run(path, "toy", *FLAGS, "--preset", "toy-small")
    assert done.returncode == 0, done.stderr
    assert "8 samples, micro-batch 4, 4 steps" in done.stdout
    assert "toy-small" in done.stdout


def test_its_mistakes_are_told_like_ours(path: Path) -> None:
    done = run(path, "toy", *FLAGS, "--toy-widht", "8")
    assert done.returncode == 2
    assert "did you mean '--toy-width'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("gone", ["its module no_such_wing cannot be imported", "No module named 'no_such_wing'"]),
        ("needy", ["its module needs cannot be imported", "No module named 'no_such_thing'"]),
        ("empty", ["its module has no function for it", "got:   empty"]),
    ],
)
def test_a_broken_one_is_told_when_it_is_asked_for(path: Path, name: str, messages: list[str]) -> None:
    done = run(path, name, "--some", "flag")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the package broken adds this command, but ")
    assert all(message in done.stderr for message in messages), done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_one_breaks_nothing_else(path: Path) -> None:
    done = run(path, "--help")
    assert done.returncode == 0, done.stderr
    for words in ("toy", "a job of the package outside", "gone", "a job of the package broken", "distill"):
        assert words in done.stdout
    assert run(path, "presets", "--json").returncode == 0


@pytest.mark.parametrize(("name", "flag"), [("presets", "--json"), ("torchrun", "--help")])
def test_a_name_of_ours_stays_ours(path: Path, name: str, flag: str) -> None:
    done = run(path, name, flag)
    assert done.returncode == 0, done.stderr
    assert "not ours" not in done.stdout
    assert f"warning: the package greedy adds a job {name!r}, a name that is taken: it is not run" in done.stderr
    alone = run(ROOT, name, flag)
    assert alone.stdout == done.stdout
    assert "warning" not in alone.stderr
