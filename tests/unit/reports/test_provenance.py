"""What a run directory says of where it comes from does not depend on what else is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ext.reports import provenance
from megatron_ext.reports.provenance import COMMIT, git_commit

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _outside_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT, raising=False)


def test_without_git_there_is_no_commit_but_what_the_image_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() is None
    monkeypatch.setenv(COMMIT, "1234abcd")
    assert git_commit() == "1234abcd"
    monkeypatch.setenv(COMMIT, "")  # an image built without it
    assert git_commit() is None


def repository(path: Path) -> str:
    """One with a commit of all that lies there; the commit."""
    told = ["git", "-C", str(path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*told, *command], check=True)
    done = subprocess.run([*told, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_checkout_knows_better_than_the_image_and_another_repository_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sources may be mounted over those of an image; a virtual environment may lie in the user's own repository."""
    package = tmp_path / "package"
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    package.mkdir()
    repository(tmp_path)
    shutil.copy(ROOT / "megatron_ext" / "reports" / "provenance.py", package)
    assert git_commit() is None
    monkeypatch.setenv(COMMIT, "1234abcd")
    assert git_commit() == "1234abcd"
    assert git_commit() != repository(tmp_path) == git_commit()


def test_the_image_is_built_with_what_is_read() -> None:
    """The build argument of the page becomes the variable."""
    dockerfile, page = ((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "README.md"))
    assert re.search(rf"^ARG {COMMIT}=$", dockerfile, re.MULTILINE)
    assert f"ENV {COMMIT}=${{{COMMIT}}}" in dockerfile
    assert f'--build-arg {COMMIT}="$(git rev-parse HEAD)"' in page
