"""`metrics.jsonl` is read the same way by everyone, whatever a killed or resumed job has left in it."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_ext.errors import DataError
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.reports.training_plot import plot_training


def metrics(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_plot_training(tmp_path: Path):
    rows = [
        {"step": i, "loss": 8 / i, "kd_loss": 1 / i, "grad_norm": 1.0, "tokens_per_second": 5.0} for i in range(1, 9)
    ]
    rows[4]["val_loss"] = 2.0
    file = metrics(tmp_path / "metrics.jsonl", *map(json.dumps, rows))
    plot_training(file, tmp_path / "plots" / "training.png")
    assert imread(tmp_path / "plots/training.png").shape[1] == 1200


def test_metrics_of_a_resumed_and_of_a_killed_job(tmp_path: Path):
    file = metrics(
        tmp_path / "metrics.jsonl",
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.0}',
        '{"step": 2, "loss": 2.5, "val_loss": 2.25}',
        '{"step": 3, "lo',
    )
    assert read_metrics(file) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5, "val_loss": 2.25},
    ]


def test_metrics_that_are_not(tmp_path: Path):
    with pytest.raises(DataError, match="no such metrics file"):
        plot_training(tmp_path / "none.jsonl", tmp_path / "out.png")
    with pytest.raises(DataError, match="no step was logged"):
        plot_training(metrics(tmp_path / "empty.jsonl", ""), tmp_path / "out.png")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        plot_training(metrics(tmp_path / "bad.jsonl", "nonsense", '{"step": 1}'), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
