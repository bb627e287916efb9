"""Ctrl-C asks for what SIGTERM asks for, once, whatever the program is doing."""

import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from megatron_ext.training.signals import finish_on_interrupt

ASKED = signal.SIGUSR1  # in the place of SIGTERM


@pytest.fixture
def asked() -> Iterator[list[int]]:
    """How often a job was asked to stop; the test's own handlers come back."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, ASKED)}
    signal.signal(ASKED, lambda number, _: came.append(number))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_in_the_middle_of_a_print(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    """What Python writes with cannot be entered a second time, so the handler goes past it."""

    def busy(_: str) -> None:
        raise RuntimeError("reentrant call")

    finish_on_interrupt(Namespace(exit_signal_handler=True, exit_signal=ASKED, rank=rank))
    with monkeypatch.context() as patch:
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, SimpleNamespace(write=busy, flush=lambda: None))
        signal.raise_signal(signal.SIGINT)
    assert asked == [ASKED]
    assert ("stopping after this step" in capfd.readouterr().err) == (rank == 0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert asked == [ASKED]


def test_without_the_flag_nothing_is_taken_over(asked: list[int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    finish_on_interrupt(Namespace(exit_signal_handler=False, exit_signal=ASKED, rank=0))
    assert signal.getsignal(signal.SIGINT) is before
