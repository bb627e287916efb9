"""A program's end: what goes wrong is said once, whichever rank it happens on, and the exit status is right."""

import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from megatron_ext.errors import ConfigError, MegatronExtError

LAUNCHER = "MEGATRON_EXT_LAUNCHER"  # set where `megatron-ext torchrun` has started the ranks and says what went wrong
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PR_SET_PDEATHSIG = 1  # of prctl(2)
LESS_MEMORY = (
    "a smaller --micro-batch-size or --seq-length, --recompute-granularity, or more ranks that share the model; "
    "--dry-run says what is needed"
)
SECONDS_OF_RANK_0 = 2.0  # in which it says what is wrong if it knows too, and torchrun ends the other ranks


def main(run: Callable[[], None]) -> int:
    """Run a program.

    Returns:
        Its exit status: 0, 2 for a user's mistake, which becomes one readable message, or 130 after Ctrl-C.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            got, legal = f"{name}={os.environ[name]}", "none, or what torchrun sets"
            print(f"error: {ConfigError('the environment', got=got, legal=legal)}", file=sys.stderr, flush=True)
            return 2
    if _rank() == 0:
        ours = logging.getLogger("megatron_ext")
        ours.setLevel(logging.INFO)
        ours.propagate = False  # Megatron's handler would say it again
        ours.handlers = [logging.StreamHandler()]
    _end_with_launcher()
    try:
        run()
    except MegatronExtError as error:
        return report(error)
    except SystemExit as end:
        if end.code in (0, None):  # Megatron ends so when it was told to stop
            _leave_process_groups()
        raise
    except KeyboardInterrupt:
        if _rank() == 0:
            print("stopped", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            room = "room there; the same command goes on from what is complete"
            got = error.filename or "a file of this job"
            return report(MegatronExtError(f"nothing more can be written: {error.strerror}", got=got, legal=room))
        if _out_of_memory(error):
            traceback.print_exc()  # where: which model, which step
            what = str(error).splitlines()[0]
            return report(MegatronExtError("there is not enough memory", got=what, legal=LESS_MEMORY))
        _leave_word(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    _leave_process_groups()
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation has failed, of the host's memory or of a GPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def report(error: MegatronExtError) -> int:
    """Say what is wrong, on the first rank that finds it; its exit status.

    What is wrong with a command line is found by every rank, and rank 0 says it. What only another rank can see, such
    as a disk that one node lacks, that rank says after giving rank 0 the time to.
    """
    _leave_word(str(error), f"error: {error}")
    whose = ""
    if _rank() != 0:
        for number in (signal.SIGTERM, signal.SIGINT):  # a handler of ours would not end the rank
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, signal.SIG_DFL)
        time.sleep(SECONDS_OF_RANK_0)
        whose = f" (rank {_rank()})"
    if LAUNCHER not in os.environ or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(f"error{whose}: {error}", file=sys.stderr, flush=True)
    return getattr(error, "exit_status", 2)


def _end_with_launcher() -> None:
    """Let the kernel ask this rank to stop when torchrun's agent dies, which would else leave it behind (Linux)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != agent:  # it died meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_process_groups() -> None:
    """End the threads of process groups before the interpreter takes away what they use."""
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _leave_word(message: str, details: str) -> None:
    """Tell torchrun, whose summary of failed ranks then has it instead of the address of a page on the web."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    content = {"message": message, "extraInfo": {"py_callstack": details, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w") as file:  # the error itself matters more
        json.dump({"message": content}, file)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
