"""What a run says while it works: `metrics.jsonl`, one line per step; for people `training.log`, one line an interval,
which is printed, too; and a live bar on a terminal.

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

import torch

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.reports.metrics_file import key_of, read_metrics
from megatron_ext.reports.progress import Progress

VALIDATION = " validation"
LOG = "training.log"
LINE_SECONDS = 10
SCALES = ((3600, "h"), (60, "min"), (1, "s"))


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
        every: Steps from one line for people to the next; there is one also for each validation, and after a while.
        share: What one of the unit a second is of the peak of all GPUs, if that is known.
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
        every: int = 1,
        share: float | None = None,
    ) -> None:
        self.path, self.inner = path, inner
        self._per_step, self._train_iters, self._unit = per_step, train_iters, unit
        self._every, self._share = every, share
        self._begun = self._said = self._time = time.perf_counter()
        self._first = start
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
            self._tell()
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

    def _tell(self) -> None:
        """A line for people, where one is due; of a step that is done."""
        step, now = self._record.get("step", self._first), time.perf_counter()
        due = step % self._every == 0 or step == self._train_iters or "val_loss" in self._record
        if step <= self._first or not (due or now - self._said > LINE_SECONDS):
            return
        self._said = now
        left = None
        if self._train_iters and step < self._train_iters:
            left = (now - self._begun) / (step - self._first) * (self._train_iters - step)
        text = log_line(self._record, self._unit, self._train_iters, left, self._share)
        self._shown.say(text)
        with self.path.with_name(LOG).open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def flush(self) -> None:
        """Write the step in progress, to the disk."""
        self._write()
        os.fsync(self._file.fileno())
        if self.inner is not None:
            self.inner.flush()

    def close(self) -> None:
        """Write the last step and close the files."""
        self._write()
        self._tell()
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


def log_line(
    record: dict[str, Any], unit: str, last: int | None, left: float | None = None, share: float | None = None
) -> str:
    """A step in one line of a terminal.

    Args:
        record: Of `metrics.jsonl`.
        unit: What is counted: tokens, or samples.
        last: The last step, if it is known.
        left: Seconds until then, if that is known.
        share: See `MetricsLog`.
    """
    rate = record.get(f"{unit}_per_second")
    parts = [f"step {record['step']:,}" + (f"/{last:,}" if last else "")]
    losses = [key for key in record if key.endswith("loss") and not key.startswith("val_")]
    for key in sorted(losses, key=lambda key: key != "loss"):
        parts.append(_shown(key.replace("_", " "), record[key], ".4f"))
    for name, key, form in (("grad norm", "grad_norm", ".3g"), ("lr", "learning_rate", ".2e")):
        parts.append(_shown(name, record[key], form) if key in record else "")
    if rate is not None:
        parts += [f"{rate:,.0f} {unit}/s", "" if share is None else f"MFU {rate * share:.0%}"]
    parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "")
    parts += [_shown(f"validation {key[4:].replace('_', ' ')}", value, ".4f") for key, value in record.items()
              if key.startswith("val_")]  # fmt: skip
    if left is not None:
        scale, name = next((each for each in SCALES if left >= 2 * each[0]), SCALES[-1])
        parts.append(f"{left / scale:,.0f} {name} left" if left >= 10 * scale else f"{left / scale:.1f} {name} left")
    return "  ".join(filter(None, parts))


def _shown(name: str, value: float | None, form: str) -> str:
    return f"{name} {value:{form}}" if value is not None else f"{name} not finite"


def _note(record: dict[str, Any], unit: str) -> str:
    """The losses and the speed of a step, for the bar."""
    shown = {"loss {:.3f}": "loss", f"{{:,.0f}} {unit}/s": f"{unit}_per_second", "validation {:.3f}": "val_loss"}
    return "  ".join(form.format(record[key]) for form, key in shown.items() if record.get(key) is not None)
