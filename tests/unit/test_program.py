"""What ends a program becomes one line where a user can do something about it."""

import errno

import pytest

from megatron_ext.program import main


def test_a_full_disk_is_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/metrics.jsonl")

    assert main(run) == 2
    assert capsys.readouterr().err.startswith(
        "error: nothing more can be written: No space left on device\n  got:   somewhere/metrics.jsonl\n"
    )


def test_another_error_of_the_system_is() -> None:
    def run() -> None:
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    with pytest.raises(OSError, match="Input/output error"):
        main(run)
