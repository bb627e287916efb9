"""What Megatron says goes into a file, so that what a job itself says can be read.

Megatron prints a line for every parameter, timer and argument; a training's own line an interval is in
`reports.metrics_log`. With `MEGATRON_EXT_VERBOSE=1` everything is printed as it comes.
"""

import io
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

VERBOSE = "MEGATRON_EXT_VERBOSE"
FOLDER = "logs"
HELD = 2000  # lines, until there is a file to write them to
LAST = 15  # lines that are shown where it ends badly, and there is no file
_stdout: list[TextIO] = []


def say(text: str) -> None:
    """Print a line of the job's own, also where Megatron's are not shown."""
    print(text, file=_stdout[-1] if _stdout else sys.stdout, flush=True)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "megatron_ext"


def is_suppressed() -> bool:
    """Whether what is printed goes elsewhere at the moment."""
    return bool(_stdout)


@contextmanager
def suppressed_output() -> Iterator[None]:
    """Without what Megatron says inside the block, such as its several hundred arguments, which are in config.yaml."""
    if os.environ.get(VERBOSE):
        yield
        return
    with MegatronOutput(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of being alone
        yield


class MegatronOutput(io.TextIOBase):
    """Standard output and the logs of other packages inside the block, held, and written to a file once there is one.

    Where an exception ends the block, the last lines are shown, or where they are.
    """

    def __init__(self) -> None:
        self._held: deque[str] = deque(maxlen=HELD)
        self._file: TextIO | None = None
        self._before: dict[str, Any] = {}

    def __enter__(self) -> "MegatronOutput":
        if os.environ.get(VERBOSE):
            return self
        root = logging.getLogger()
        self._before = {"stdout": sys.stdout, "handlers": root.handlers[:], "show": warnings.showwarning}
        _stdout.append(_stdout[-1] if _stdout else sys.stdout)
        sys.stdout = self
        handler = logging.StreamHandler(self)  # type: ignore[arg-type]
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        handler.addFilter(lambda record: not _is_ours(record))
        ours = logging.StreamHandler()  # rank 0's has a handler of its own, and does not come here
        ours.addFilter(_is_ours)
        root.handlers = [handler, ours]
        logging.captureWarnings(True)
        return self

    def write_to(self, directory: Path, rank: int) -> None:
        """From now on write to a file of a run directory; what was said before comes first."""
        if not self._before or self._file is not None:
            return
        path = directory / FOLDER / f"megatron-rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.writelines(self._held)
        self._held.clear()

    def write(self, text: str) -> int:
        """Keep a part of a line, or several lines."""
        if self._file is not None:
            return self._file.write(text)
        self._held.append(text)
        return len(text)

    def flush(self) -> None:
        """Write what there is to the file."""
        if self._file is not None:
            self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        logging.captureWarnings(False)
        sys.stdout, logging.getLogger().handlers = self._before["stdout"], self._before["handlers"]
        warnings.showwarning = self._before["show"]
        _stdout.pop()
        self._before = {}
        if isinstance(error, Exception) and not _stdout:
            lines = "".join(self._held).splitlines()[-LAST:]
            told = f"in {self._file.name}" if self._file else "\n  " + "\n  ".join(lines)
            if self._file or lines:
                print(f"what Megatron has said before is {told}", file=sys.stderr, flush=True)
        if self._file is not None:
            self._file.close()
