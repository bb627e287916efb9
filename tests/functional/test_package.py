"""What is installed without a checkout has all that the commands need, and completes itself in a shell."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, and nothing that building leaves beside them."""
    path = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes((ROOT / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (found,) = (source / "out").glob("*.whl")
    return found


def test_a_wheel_is_the_package_with_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_ext").rglob("*.py")}
    assert names == ours | {"megatron_ext/py.typed"}
    assert "Requires-Dist: torch<2.12,>=2.11" in metadata, "the platform replaces names inside of torch"
    assert "Classifier: Typing :: Typed" in metadata
    for extra in ("dev", "eval", "gguf", "gpu", "vision", "wandb"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_a_source_archive_has_the_programs_the_recipes_and_the_tests(source: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", "out"], cwd=source, check=True, capture_output=True
    )
    (found,) = (source / "out").glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pretrain_hybrid.py", "prune_gpt.py", "distill_gpt.py", "Makefile", "constraints.txt", "docs/prune.md",
                 "examples/run.sh", "examples/prune/all.flags", "docker/Dockerfile", "tests/conftest.py", "LICENSE",
                 "megatron_ext/py.typed"):  # fmt: skip
        assert name in names, name


def test_what_is_installed_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "MEGATRON_EXT_DEVICE": "cpu"}
    code = "import megatron_ext, pathlib; print(pathlib.Path(megatron_ext.__file__).parents[1])"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.strip() == str(tmp_path / "site")
    data = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511", "--seq-length", "64")
    sizes = ("--train-iters", "1", "--lr", "1e-3", "--global-batch-size", "2")
    command = [sys.executable, "-m", "megatron_ext", "pretrain", "--preset", "tiny-hybrid", *data, *sizes, "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory per GPU" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("megatron-ext pre", {"pretrain ", "presets "}),
        ("megatron-ext generate --temp", {"--temperature "}),
        ("megatron-ext vision ev", {"evaluate "}),
        ("megatron-ext compress m --token", {"--tokens ", "--tokenizer-model ", "--tokenizer-type "}),
    ],
)
def test_a_shell_completes_commands_and_flags(typed: str, expected: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": typed,
        "_ARGCOMPLETE_IFS": "|",
    }
    asked |= {
        "COMP_POINT": str(len(typed)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([Path(sys.executable).with_name("megatron-ext")], env=os.environ | asked, check=True)
    assert {word if word.endswith(" ") else f"{word} " for word in answer.read_text().split("|")} == expected
