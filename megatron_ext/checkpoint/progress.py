"""The progress of a table of moves, by bytes."""

import sys
import time

from megatron_ext.checkpoint import ranks

LINE_SECONDS = 10


class ByteProgress:
    """A bar on a terminal, otherwise a line every few seconds; the first process shows it for all.

    Args:
        verb: What is done with the bytes, such as "converted".
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self.total, self._last, self._bar, self._task = 0, time.monotonic(), None, None

    def __enter__(self) -> "ByteProgress":
        if sys.stdout.isatty() and ranks.rank() == 0:
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
        elif ranks.rank() == 0 and time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._verb} {done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)
