"""How far a job is: a bar on a terminal, elsewhere a line every few seconds; on rank 0, on standard error."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

LINE_SECONDS = 10


class Advance(Protocol):
    """Called when some more is done."""

    def __call__(self, count: int = 1) -> None: ...


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Show progress while the block runs.

    Args:
        what: What is done, such as "scoring".
        total: When all is done.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield lambda count=1: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: Any = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count=1: bar.advance(task, count)
    else:
        yield _Lines(what, total)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._last = what, total, 0, time.monotonic()

    def __call__(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._what}: {self._done:,} of {self._total:,}", file=sys.stderr, flush=True)


class ByteProgress:
    """Progress by bytes, on standard output, for `checkpoint.stream`; rank 0 shows it for all.

    Args:
        verb: What is done with the bytes, such as "converted".
    """

    def __init__(self, verb: str) -> None:
        self._verb, self._shows = verb, int(os.environ.get("RANK", "0")) == 0
        self.total, self._last, self._bar, self._task = 0, time.monotonic(), None, None

    def __enter__(self) -> "ByteProgress":
        if sys.stdout.isatty() and self._shows:
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task(self._verb, total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif self._shows and time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._verb} {done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)
