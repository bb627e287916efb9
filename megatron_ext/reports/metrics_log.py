"""What a run says while it works: `metrics.jsonl`, one line per step, and a live bar on a terminal.

Megatron reports every scalar to its TensorBoard writer, in full precision; `MetricsLog` stands in that place, keeps
what it needs and passes everything on to the real writer where there is one.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.reports.metrics_file import key_of, read_metrics
from megatron_ext.reports.progress import Progress

VALIDATION = " validation"


def _float(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None  # NaN is not JSON


class MetricsLog:
    """A TensorBoard `SummaryWriter` that also writes `metrics.jsonl`.

    The line of a step is written when the next step begins, before a checkpoint is saved (`flush`) and at the end, and
    again if the step's validation comes after that.

    Args:
        path: The file. Lines of steps after `start` (a run that died between two checkpoints) are dropped.
        start: Step that the run resumes from, 0 for one that begins.
        per_step: Tokens of one step, read at each step because batch sizes may ramp up.
        train_iters: The last step, for the bar and the remaining time, if it is known.
        inner: The real TensorBoard writer, if the user asked for one.
        unit: What is counted: tokens, or samples.
        before: How many of them the loaded checkpoint has seen, where the file has no line of it.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        per_step: Callable[[], int],
        train_iters: int | None,
        inner: Any = None,
        unit: str = "tokens",
        before: int = 0,
    ) -> None:
        self.path, self.inner = path, inner
        self._per_step, self._train_iters, self._unit = per_step, train_iters, unit
        self._time = time.perf_counter()
        earlier = [r for r in read_metrics(path) if r["step"] <= start] if path.exists() else []
        self._count = int(earlier[-1].get(unit, before)) if earlier else before
        write_text(path, "".join(_line(r) for r in earlier))
        self._file: TextIO = path.open("r+")
        # The step in progress, and where its line begins.
        self._record: dict[str, Any] = dict(earlier[-1]) if earlier else {}
        self._offset = self._file.seek(0, os.SEEK_END) - len(_line(self._record)) if earlier else 0
        # Megatron prints lines; only one rank has a log.
        self._shown = Progress("training", train_iters, start=start, lines=False, shows=True)
        self._shown.__enter__()

    def add_scalar(self, tag: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """Called by Megatron for each scalar of a step; the first scalar of the next step closes the line."""
        if self.inner is not None:
            self.inner.add_scalar(tag, value, step, *args, **kwargs)
        if tag.endswith(" vs samples"):
            return
        if self._record.get("step", step) != step:
            self._write()
            self._record, self._offset = {}, self._file.tell()
        if tag.endswith(VALIDATION):
            # Validation follows the step it belongs to, and its time is not training time.
            key = f"val_{key_of(tag.removesuffix(VALIDATION))}"
            self._record |= {"step": step, self._unit: self._count, key: _float(value)}
            self._time = time.perf_counter()
            return
        if not self._record:
            now = time.perf_counter()
            count = self._per_step()
            self._count += count
            self._record |= {"step": step, self._unit: self._count, "seconds": now - self._time}
            self._record[f"{self._unit}_per_second"] = count / (now - self._time)
            self._time = now
        self._record[key_of(tag)] = _float(value)

    def _write(self) -> None:
        if self._record:
            self._file.seek(self._offset)
            self._file.write(_line(self._record))
            self._file.truncate()
            self._shown.update(self._record["step"], note=_note(self._record, self._unit))
            if self._train_iters and self._record["step"] >= self._train_iters:
                self._shown.__exit__()

    def flush(self) -> None:
        """Write the step in progress, to the disk."""
        self._write()
        os.fsync(self._file.fileno())
        if self.inner is not None:
            self.inner.flush()

    def close(self) -> None:
        """Write the last step and close the files."""
        self._write()
        self._shown.__exit__()
        self._file.close()
        if self.inner is not None:
            self.inner.close()

    def __getattr__(self, name: str) -> Any:
        # add_text, add_histogram, ...: the real writer's, or nothing where there is none.
        if self.inner is not None:
            return getattr(self.inner, name)
        return lambda *args, **kwargs: None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _note(record: dict[str, Any], unit: str) -> str:
    """The losses and the speed of a step, for the bar."""
    shown = {"loss {:.3f}": "loss", f"{{:,.0f}} {unit}/s": f"{unit}_per_second", "validation {:.3f}": "val_loss"}
    return "  ".join(form.format(record[key]) for form, key in shown.items() if record.get(key) is not None)
