"""How far a job is: a bar on a terminal, elsewhere a line every ten seconds; on standard error."""

import os
import sys
import time
from typing import Any, Literal

from megatron_ext.reports.megatron_output import is_suppressed, say

LINE_SECONDS = 10


class Progress:
    """How far a job is, shown while the block runs.

    Args:
        what: What is done, such as "scoring".
        total: When all is done; None if it is not known, or `update` will say it.
        start: How much is done already.
        unit: What is counted; bytes are shown as MB or GB.
        lines: Whether lines are printed where there is no terminal.
        shows: Whether this process shows it; by default only rank 0 does.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        start: int = 0,
        unit: Literal["", "bytes"] = "",
        lines: bool = True,
        shows: bool | None = None,
    ) -> None:
        self.what, self.total, self.done, self.note = what, total, start, ""
        self._unit, self._start = unit, start
        self._begun = self._last = time.monotonic()
        if shows is None:
            shows = int(os.environ.get("RANK", "0")) == 0
        self._bar = self._make_bar() if shows and sys.stderr.isatty() else None
        self._lines = shows and lines and self._bar is None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Say that some more is done."""
        self.update(self.done + count)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say how much is done.

        Args:
            done: Of all.
            total: When all is done, where that was not known before.
            note: Shown behind it, such as a loss.
        """
        self.done, self.total, self.note = done, total or self.total, note
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=self.total, note=note)
        elif self._lines and time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        scale, suffix, digits = 1.0, "", ",.0f"
        if self._unit == "bytes":
            giant = (self.total or self.done) >= 1e9
            scale, suffix, digits = (1e9, " GB", ".2f") if giant else (1e6, " MB", ".0f")
        all_of_it = f" of {self.total / scale:{digits}}" if self.total is not None else ""
        if self.total is None and not self.done:  # nothing is counted
            return f"{self.what}: {self.note}"
        parts = [f"{self.what}: {self.done / scale:{digits}}{all_of_it}{suffix}", self._left(), self.note]
        return ", ".join(filter(None, parts))

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            say(text)

    def _left(self) -> str:
        """The minutes that are left at the speed so far, where that can be told."""
        seconds, new = time.monotonic() - self._begun, self.done - self._start
        if self.total is None or new <= 0 or seconds < LINE_SECONDS or self.done >= self.total:
            return ""
        return f"{seconds / new * (self.total - self.done) / 60:,.1f} min left"

    def _make_bar(self) -> Any:
        from rich import progress
        from rich.console import Console

        sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
        counted: Any = sizes if self._unit == "bytes" else (progress.MofNCompleteColumn(),)
        note = progress.TextColumn("{task.fields[note]}")
        columns: Any = (self.what, progress.BarColumn(), *counted, progress.TimeRemainingColumn(), note)
        # What is printed meanwhile appears above the bar; but not what is hidden.
        bar = progress.Progress(*columns, console=Console(stderr=True), redirect_stdout=not is_suppressed())
        bar.add_task(self.what, total=self.total, completed=self.done, note="")
        return bar
