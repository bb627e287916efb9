import os
import signal

import pytest

from megatron_ext.inference import interrupt
from megatron_ext.inference.interrupt import Interrupted, exchange, interruptible, stop_if_asked


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_for_an_end_between_pieces_of_work(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with interruptible():
        stop_if_asked()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as torchrun and the terminal both send one
        assert exchange("answer") == (["answer"], number)  # what was being done is done
        with pytest.raises(Interrupted, match=number.name) as stopped:
            stop_if_asked()
    assert stopped.value.status == status
    assert signal.getsignal(number) is before
    assert exchange("answer") == (["answer"], 0)


def test_forks_that_are_made_meanwhile_end_when_they_are_told_to() -> None:
    with interruptible():
        child = os.fork()
        if child == 0:
            if any(signal.getsignal(number) is not signal.SIG_DFL for number in interrupt.SIGNALS):
                os._exit(1)  # a handler in Python, which a fork that waits for a lock never comes to
            signal.pause()
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        stop_if_asked()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(interrupt.SIGNALS)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_second_signal_later_ends_the_program_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "TWICE", -1.0)
    child = os.fork()
    if child == 0:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
