"""What ends a program becomes one line where a user can do something about it."""

import errno
import sys

import pytest
import torch.distributed as dist

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


class OutOfMemoryError(RuntimeError):
    """As torch calls it on a GPU."""


@pytest.mark.parametrize(
    "error",
    [MemoryError("no more"), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand much else"),
     RuntimeError("alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")],
)  # fmt: skip
def test_too_little_memory_is_told_with_what_helps(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise error

    assert main(run) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err, "where it was"
    assert "error: there is not enough memory\n" in err
    assert "and much else" not in err.split("error: there is")[1]
    assert "--dry-run says what is needed" in err


def group() -> None:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_process_groups_end_before_the_interpreter() -> None:
    """Their threads would use what it has taken away already; so also where Megatron ends the program itself."""
    assert main(group) == 0
    assert not dist.is_initialized()

    def told_to_stop() -> None:
        group()
        sys.exit(0)

    with pytest.raises(SystemExit):
        main(told_to_stop)
    assert not dist.is_initialized()


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1")])
def test_an_environment_that_torchrun_did_not_set(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(lambda: pytest.fail("the program ran")) == 2
    assert f"got:   {name}={value}\n  legal: none, or what torchrun sets" in capsys.readouterr().err
