import json
import math

import pytest

from megatron_ext.reports import metrics_log
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.reports.metrics_log import MetricsLog


class Inner:
    """The real TensorBoard writer."""

    def __init__(self):
        self.calls = []

    def add_scalar(self, *args, **kwargs):
        self.calls.append(("add_scalar", *args))

    def add_text(self, *args):
        self.calls.append(("add_text", *args))

    def flush(self):
        self.calls.append(("flush",))

    def close(self):
        self.calls.append(("close",))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def train(log, steps, tag="lm loss"):
    for step in steps:
        log.add_scalar(tag, 10.0 / step, step)
        log.add_scalar(f"{tag} vs samples", 10.0 / step, step * 8)
        log.add_scalar("grad-norm", 0.1 * step, step)
        log.add_scalar("learning-rate", 1e-3, step)


def test_one_line_per_step_in_full_precision(path):
    log = MetricsLog(path, 0, lambda: 512, 3)
    train(log, [1, 2, 3])
    assert [row["step"] for row in read_metrics(path)] == [1, 2], "a step is written when the next one begins"
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [10.0 / step for step in (1, 2, 3)]
    assert [row["grad_norm"] for row in rows] == [0.1 * step for step in (1, 2, 3)]
    assert rows[0]["learning_rate"] == 1e-3
    assert not any("samples" in key for row in rows for key in row)


def test_tokens_add_up_also_when_the_batch_grows(path):
    size = {"now": 100}
    log = MetricsLog(path, 0, lambda: size["now"], 9)
    train(log, [1, 2])
    size["now"] = 300
    train(log, [3])
    log.close()
    rows = read_metrics(path)
    assert [row["tokens"] for row in rows] == [100, 200, 500]
    assert all(row["seconds"] > 0 for row in rows)
    for row, tokens in zip(rows, (100, 100, 300), strict=True):
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])


def test_validation_joins_the_line_of_its_step_and_costs_no_tokens(path):
    log = MetricsLog(path, 0, lambda: 10, 4)
    train(log, [1])
    log.add_scalar("lm loss validation", 1.25, 1)
    log.add_scalar("lm loss validation vs samples", 1.25, 8)
    train(log, [2])
    log.close()
    first, second = read_metrics(path)
    assert (first["loss"], first["val_loss"]) == (10.0, 1.25)
    assert "val_loss" not in second
    assert second["tokens"] == 20


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(path, value):
    log = MetricsLog(path, 0, lambda: 10, 2)
    log.add_scalar("lm loss", value, 1)
    log.close()
    text = path.read_text()
    assert '"loss": null' in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))


def test_resume_drops_the_lines_after_its_step_and_counts_on(path):
    log = MetricsLog(path, 0, lambda: 10, 6)
    train(log, [1, 2, 3, 4])
    log.close()
    before = path.read_text().splitlines()
    resumed = MetricsLog(path, 2, lambda: 10, 6)
    assert path.read_text().splitlines() == before[:2], "dropped at once: these steps will be taken again"
    train(resumed, [3])
    resumed.close()
    assert path.read_text().splitlines()[:2] == before[:2]
    assert [(row["step"], row["tokens"]) for row in read_metrics(path)] == [(1, 10), (2, 20), (3, 30)]
    assert {p.name for p in path.parent.iterdir()} == {"metrics.jsonl", "training.log"}


def test_a_run_from_the_start_drops_everything(path):
    path.parent.mkdir()
    path.write_text('{"step": 1, "tokens": 10, "loss": 1.0}\n')
    MetricsLog(path, 0, lambda: 10, 2).close()
    assert path.read_text() == ""


def test_a_line_that_a_crash_cut_off_is_left_out(path):
    path.parent.mkdir()
    path.write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert [row["step"] for row in read_metrics(path)] == [1]
    log = MetricsLog(path, 2, lambda: 10, 4)
    train(log, [3])
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_the_real_writer_gets_everything(path):
    inner = Inner()
    log = MetricsLog(path, 0, lambda: 10, 2, inner)
    log.add_scalar("lm loss", 2.0, 1)
    log.add_scalar("lm loss vs samples", 2.0, 8)
    log.add_text("note", "text")
    log.flush()
    log.close()
    assert inner.calls == [
        ("add_scalar", "lm loss", 2.0, 1), ("add_scalar", "lm loss vs samples", 2.0, 8), ("add_text", "note", "text"),
        ("flush",), ("close",),
    ]  # fmt: skip


def test_without_one_its_other_methods_do_nothing(path):
    log = MetricsLog(path, 0, lambda: 10, 2)
    assert log.add_histogram("weights", [1, 2], 1) is None
    log.flush()
    log.close()


def test_a_steps_line_is_there_when_its_checkpoint_is(path):
    """A kill between a save and the next step: the run goes on from the saved step, and its line must not be lost."""
    log = MetricsLog(path, 0, lambda: 10, 4)
    train(log, [1, 2])
    log.flush()  # as before each save
    text = path.read_text()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    log.add_scalar("lm loss validation", 1.25, 2)
    log.close()
    assert path.read_text() == text.removesuffix("}\n") + ', "val_loss": 1.25}\n'
    resumed = MetricsLog(path, 2, lambda: 10, 4)
    train(resumed, [3])
    resumed.close()
    assert [(row["step"], row["tokens"]) for row in read_metrics(path)] == [(1, 10), (2, 20), (3, 30)]
    assert [row.get("val_loss") for row in read_metrics(path)] == [None, 1.25, None]


def test_validation_of_a_resumed_step_goes_into_its_line(path):
    log = MetricsLog(path, 0, lambda: 10, 2)
    train(log, [1, 2])
    log.close()
    again = MetricsLog(path, 2, lambda: 10, 2)
    again.add_scalar("lm loss validation", 1.5, 2)
    again.close()
    assert [(row["step"], row.get("val_loss")) for row in read_metrics(path)] == [(1, None), (2, 1.5)]


def test_a_line_with_nothing_but_a_validation_is_read_as_part_of_its_step(path):
    path.parent.mkdir()
    path.write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tokens": 20}\n{"step": 2, "val_loss": 1.5}\n')
    assert read_metrics(path) == [{"step": 1, "tokens": 10}, {"step": 2, "tokens": 20, "val_loss": 1.5}]
    log = MetricsLog(path, 2, lambda: 10, 3)
    train(log, [3])
    log.close()
    assert [row["tokens"] for row in read_metrics(path)] == [10, 20, 30]


def test_the_bar_says_loss_speed_and_validation():
    note = metrics_log._note({"step": 2, "loss": 2.5, "tokens_per_second": 1234.5, "val_loss": 2.75}, "tokens")
    assert note == "loss 2.500  1,234 tokens/s  validation 2.750"
    assert metrics_log._note({"step": 2, "val_loss": 2.75, "loss": None}, "samples") == "validation 2.750"


def test_people_get_a_line_an_interval_and_one_for_each_validation(path, capsys):
    log = MetricsLog(path, 0, lambda: 512, 7, every=3)
    train(log, [1, 2, 3, 4])
    log.add_scalar("lm loss validation", 2.5, 4)
    train(log, [5, 6, 7])
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("  ")[0] for line in said] == ["step 3/7", "step 4/7", "step 6/7", "step 7/7"]
    assert "loss 2.5000  grad norm 0.4  lr 1.00e-03" in said[1]
    assert said[1].count("validation loss 2.5000") == 1
    assert " left" in said[0]
    assert " left" not in said[-1]
    kept = path.with_name("training.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in kept] == said


def test_a_run_that_goes_on_says_its_own_steps(path, capsys):
    for first, last in ((1, 2), (3, 4)):
        log = MetricsLog(path, first - 1, lambda: 512, last)
        train(log, range(first, last + 1))
        log.close()
    said = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert said == ["step 1/2", "step 2/2", "step 3/4", "step 4/4"]


def test_what_is_not_finite_is_said():
    line = metrics_log.log_line({"step": 3, "loss": None, "grad_norm": None}, "tokens", 9)
    assert line.startswith("step 3/9  loss not finite  grad norm not finite")


@pytest.mark.parametrize(
    ("left", "expected"),
    [(7, "7.0 s"), (60, "60 s"), (119, "119 s"), (300, "5.0 min"), (5400, "90 min"), (90000, "25 h")],
)
def test_time_is_told_in_its_scale(left, expected):
    record = {"step": 1, "tokens_per_second": 2_000.0}
    line = metrics_log.log_line(record, "tokens", 9, left=left, share=2e-4)
    assert line.endswith(f"{expected} left")
    assert "2,000 tokens/s  MFU 40%" in line
