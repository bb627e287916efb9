"""`megatron-ext torchrun`: torchrun that lets its ranks end well.

torchrun itself answers SIGTERM and Ctrl-C by passing them on, killing what still runs 30 seconds later, and ending with
status 1. A step of a large model and its checkpoint take longer. Here the first signal asks the ranks to stop, and they
take the time they need; the status is theirs, and what a rank had to say is the last line instead of a stack trace.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import psutil

from megatron_ext.errors import MegatronExtError

STOPS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
ENDED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Of a rank that did not end itself."""
AT_ONCE = 10  # seconds: less than torchrun waits before it kills a rank that goes on after another has failed


class RankError(MegatronExtError):
    """A rank failed; its exit status becomes that of the command."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status


def main(args: argparse.Namespace) -> None:
    """Start the ranks and wait for them.

    Args:
        args: `words`, torchrun's own command line.

    Raises:
        RankError: One failed; with what it said, and its exit status (128 + the signal that ended it).
        SystemExit: The command was told to stop before the ranks had anything to save: 128 + the signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    from megatron_ext.program import LAUNCHER

    parser = get_args_parser()
    parser.prog = "megatron-ext torchrun"
    options = parser.parse_args(args.words)
    # torchrun leaves the others to us; Ctrl-\ and a closed terminal still end everything.
    options.signals_to_handle = "SIGHUP,SIGQUIT"
    os.environ[LAUNCHER] = "1"  # the ranks leave the last word to this process
    came = _hand_on_signals()
    try:
        run(options)
    except ChildFailedError as failure:
        rank = cause(failure.failures)
        first = failure.failures[rank]
        if came and first.exitcode == -signal.SIGTERM:
            print("stopped before the first step: nothing was there to save", file=sys.stderr, flush=True)
            raise SystemExit(128 + came[0]) from None
        status = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        raise RankError(_said(rank, first.exitcode, first.error_file_data), status) from None


def cause(failures: Mapping[int, Any]) -> int:
    """The rank that has failed first: torchrun's times are whole seconds, in which the others notice, too.

    One that was killed or has crashed leaves no word, while those that talk to it say that the connection is lost.

    Args:
        failures: By rank torchrun's `ProcessFailure`.
    """
    ranks = sorted(failures, key=lambda rank: failures[rank].timestamp)
    begun = failures[ranks[0]].timestamp
    gone = [rank for rank in ranks if -failures[rank].exitcode in ENDED and failures[rank].timestamp - begun < AT_ONCE]
    return (gone or ranks)[0]


def _hand_on_signals() -> list[int]:
    """From now on, hand signals to the ranks; the list fills with those that asked for a stop."""
    came: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        ranks = [child for child in psutil.Process().children() if _is_rank(child)]
        if number in PASSED_ON:
            _send(ranks, number)
            return
        came.append(number)
        if not ranks:
            raise SystemExit(128 + number)
        if len(came) == 1 and number == signal.SIGINT:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping after this step, and saving if there is a --save; Ctrl-C again stops at once\n")
        # The second time nothing is waited for.
        _send(ranks, signal.SIGTERM if len(came) == 1 else signal.SIGKILL)

    for number in (*STOPS, *PASSED_ON):
        signal.signal(number, hand_on)
    return came


def _is_rank(child: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in child.environ()
    except psutil.Error:  # it has just ended
        return False


def _send(ranks: list[psutil.Process], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            rank.send_signal(number)


def _said(rank: int, exitcode: int, data: object) -> str:
    """What is known of why a rank failed: its own words, else the signal that ended it, else its status."""
    message = data.get("message") if isinstance(data, dict) else None
    if isinstance(message, dict) and message.get("message"):
        return f"{message['message']}" if rank == 0 else f"rank {rank}: {message['message']}"
    if exitcode < 0:
        return f"rank {rank} was ended by {signal.Signals(-exitcode).name}"
    return f"rank {rank} ended with status {exitcode}"
