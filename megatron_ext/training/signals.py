"""How a job that trains is told to stop: SIGTERM from a scheduler, Ctrl-C from a person.

From its first step on it finishes the step, saves, and ends with status 0. Before that there is nothing to save, and
the signal ends it at once, wherever it is: indices of a large corpus and weights of a large model take minutes.
"""

import os
import signal
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any


def end_at_once(args: Namespace) -> None:
    """Give both signals back to the system: from here on there is nothing to save."""
    if args.exit_signal_handler:
        signal.signal(args.exit_signal, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish_step(args: Namespace) -> None:
    """From here on, let Megatron finish its step, or whoever asks `requested` its work."""
    if args.exit_signal_handler:
        from megatron.training import get_signal_handler

        handler: Any = get_signal_handler()
        handler.__enter__()
        finish_on_interrupt(args)


def finish_on_interrupt(args: Namespace) -> None:
    """From here on, let Ctrl-C ask for what SIGTERM asks for."""
    if args.exit_signal_handler:
        signal.signal(signal.SIGINT, partial(_interrupt, args))


def from_first_step(args: Namespace, forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward_step_func` with which both signals end the job at once until it is first called."""
    begun = False

    def step(*inputs: Any, **options: Any) -> Any:
        nonlocal begun
        if not begun:
            begun = True
            finish_step(args)
        return forward_step(*inputs, **options)

    end_at_once(args)
    return step


def requested(args: Namespace) -> bool:
    """Whether any rank was told to stop. A collective of all ranks, once process groups have formed."""
    if not args.exit_signal_handler:
        return False
    from megatron.training import get_signal_handler

    handler: Any = get_signal_handler()
    return any(handler.signals_received())


def _interrupt(args: Namespace, *_: Any) -> None:
    """Ctrl-C asks Megatron to finish its step and save; a second one stops at once."""
    if args.rank == 0:
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step, and saving if there is a --save; Ctrl-C again stops at once\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(args.exit_signal)
