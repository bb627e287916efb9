"""`make test ONLY=ROOM`: every test belongs to a room, and a room that does not exist is told."""

import os
import subprocess
import sys

import pytest
from rooms import ROOMS, TESTS, paths_of

ROOT = TESTS.parent


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """The Makefile with the environment that runs this test, which it must not try to set up."""
    command = ["make", "--no-print-directory", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready", *words]
    # `make test` tells what it starts that they are part of it.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_test_belongs_to_a_room() -> None:
    rooms = [path for room in ROOMS for path in paths_of(room)]
    for test in TESTS.rglob("test_*.py"):
        assert {test, *test.parents} & set(rooms), f"{test} is in no room of tests/support/rooms.py"


def test_every_room_of_the_package_has_tests() -> None:
    packages = {path.parent.name for path in (ROOT / "megatron_ext").glob("*/__init__.py")}
    assert packages <= set(ROOMS)
    assert all(paths_of(room) for room in ROOMS)


def test_the_table_names_what_exists() -> None:
    for room, patterns in ROOMS.items():
        for pattern in patterns:
            assert list(TESTS.glob(pattern)), f"{room}: {pattern}"


def test_a_room_is_its_unit_tests_and_those_of_the_table() -> None:
    found = {str(path.relative_to(TESTS)) for path in paths_of("pruning")}
    assert {"unit/pruning", "distributed/test_apply.py", "functional/test_prune.py"} < found
    assert not [name for name in found if "distill" in name]


@pytest.mark.parametrize(
    ("words", "paths"),
    [(["test"], []), (["test", "ONLY=data reports"], ["tests/unit/data", "tests/unit/reports"])],
    ids=["everything", "two rooms"],
)
def test_what_make_runs(words: list[str], paths: list[str]) -> None:
    before, only, command = make("--dry-run", *words).stdout.partition("only=")
    assert ("pyright" in before) == (paths == []), "the other checks belong to the whole"
    shown = only + command.replace(f"{sys.prefix}/bin/pytest", "printf '%s ' pytest")
    done = subprocess.run(["bash", "-euc", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    workers = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert done.stdout.split() == ["pytest", *workers, *paths]


@pytest.mark.parametrize("name", ["prunning", "utils"])
def test_a_room_that_does_not_exist_is_told(name: str) -> None:
    done = make("--silent", "test", f"ONLY={name}")
    assert done.returncode == 2
    assert f"error: no such room has tests\n  got:   ONLY={name}\n  legal: " in done.stderr
    assert ("did you mean 'pruning'?" in done.stderr) == (name == "prunning")
    assert "one of checkpoint, cli, compression, " in done.stderr
    assert done.stdout == "", "no test has run"


SUBJECTS = {
    "ops/test_triton_compiles.py", "ops/test_triton_interpreter.py", "ops/ssd/test_triton_configurations.py",
    "platform/test_quiet.py", "pruning/test_masking.py", "pruning/test_recipes.py",
    "checkpoint/test_reader_and_writer.py", "checkpoint/huggingface/test_foreign_directories.py",
    "checkpoint/huggingface/test_types.py", "vision/test_timm_and_export.py", "test_performance_page.py",
    "test_reliability_page.py", "test_pages.py", "test_rooms.py", "test_names.py", "test_flag_list.py",
    "test_fork_server.py",
}  # fmt: skip
"""Unit tests of what several modules do together, or of what lies beside the package."""


def test_the_others_mirror_the_package() -> None:
    for test in (TESTS / "unit").rglob("test_*.py"):
        own = test.relative_to(TESTS / "unit")
        module = ROOT / "megatron_ext" / own.parent / own.stem.removeprefix("test_")
        known = str(own) in SUBJECTS or module.with_suffix(".py").is_file() or module.is_dir()
        assert known, f"{own}: no such module; tests/unit mirrors megatron_ext"
