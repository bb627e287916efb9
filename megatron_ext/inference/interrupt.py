"""Ctrl-C and SIGTERM while a model answers: the batch is finished, what came out is kept, and the program ends.

Ranks are told at different moments, or only some of them. So each tells the others with its answers, and all stop
after the same batch.
"""

import functools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_ext.checkpoint.ranks import gather, rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TWICE = 2.0  # seconds in which a second signal is the first once more: from the terminal and from torchrun
_asked = 0  # the signal that asked this rank to stop, or 0
_active = False  # whether signals ask


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """All ranks have stopped after the same batch.

    Attributes:
        signal: What asked for it.
        status: The exit status that says so: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.status = number, 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, the first SIGINT or SIGTERM asks for `Interrupted`; a second ends the program at once."""
    global _asked, _active
    began = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        nonlocal began
        if _asked and time.monotonic() - began > TWICE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not _asked:
            _asked, began = number, time.monotonic()
            if rank() == 0:
                # Not print: the signal may have come in the middle of one.
                os.write(2, b"stopping after this batch; once more stops at once\n")

    _spare_forks()
    _active, before = True, {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield
    finally:
        _active = False
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = 0


@functools.cache
def _spare_forks() -> None:
    """Let forks end when they are told to, as those that the harness bootstraps errors with.

    Not by a handler of theirs, which would wait for the interpreter, which may wait for a lock that no thread has
    any more. Nor may a signal come before they have none.
    """
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_leave)


def _hold() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _leave() -> None:
    if _active:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _release()


def exchange[T](value: T) -> tuple[list[T], int]:
    """The values of all processes, in order, and the signal that asked any of them to stop, or 0. A collective."""
    found = gather((value, _asked))
    return [value for value, _ in found], max(asked for _, asked in found)


def stop_if_asked() -> None:
    """Raise `Interrupted` on all ranks if any was asked to stop: between one piece of work and the next. Collective."""
    _, asked = exchange(None)
    if asked:
        raise Interrupted(asked)
