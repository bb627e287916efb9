"""What a run directory says of where it comes from does not depend on what else is installed."""

import pytest

from megatron_ext.training.run_directory import git_commit


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() is None
