"""`metrics.jsonl`: one JSON object per training step, the only numbers that reports, plots and later starts read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError

FILE = "metrics.jsonl"
NAMES = {"lm loss": "loss", "grad-norm": "grad_norm", "learning-rate": "learning_rate"}


def key_of(tag: str) -> str:
    """The key in `metrics.jsonl` of what Megatron reports under a tag."""
    return NAMES.get(tag, tag.replace(" ", "_").replace("-", "_"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order, one row per step.

    Of a step that was logged twice, as after a resume or with its validation, the last values count. A last line that
    a killed job left half-written is ignored.

    Args:
        path: The file.

    Raises:
        DataError: There is no such file, or a line before the last is not a logged step.
    """
    if not path.is_file():
        raise DataError("no such metrics file", got=path, legal=f"a job's {FILE}")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            step = row["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError("not a logged step", got=f"{path}:{number}: {line[:80]}") from error
            break
        rows[step] = rows.get(step, {}) | row
    return [rows[step] for step in sorted(rows)]


def finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
