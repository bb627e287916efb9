"""The report says what was measured, whichever way it came out, and leaves no half-written file."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_ext.demo import report as reporting
from megatron_ext.errors import DataError


def measured(
    teacher: float = 3.2, pruned: float = 5.9, distilled: float = 3.4, scratch: float = 3.52
) -> dict[str, Any]:
    def row(params: int, loss: float, tokens: int, pattern: str) -> dict[str, Any]:
        history = [{"tokens": tokens * i // 4, "val_loss": loss + 3 / i, "loss": loss} for i in range(1, 4)]
        seconds = tokens / 8000
        return {
            "params": params,
            "non_embedding_params": params - 524_288,
            "val_loss": loss,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": 8000.0 if tokens else 0,
            "pattern": pattern,
            "history": history if tokens else [],
        }

    return {
        "teacher": row(6_000_000, teacher, 2_000_000, "M-M*-M-M*-"),
        "pruned": row(3_000_000, pruned, 0, "M-M*-"),
        "distilled": row(3_000_000, distilled, 1_000_000, "M-M*-"),
        "scratch": row(3_000_000, scratch, 1_000_000, "M-M*-"),
        "versions": {"torch": "2.11.0"},
        "flags": {"teacher": ["--seq-length", "256"]},
    }


@pytest.mark.parametrize(
    ("distilled", "scratch", "expected"),
    [
        (3.40, 3.52, "Distilled is 0.12 nats better than scratch at equal tokens (1 M): 3.400 against 3.520"),
        (3.52, 3.40, "Distilled is 0.12 nats worse than scratch at equal tokens (1 M): 3.520 against 3.400"),
        (3.501, 3.50, "Distilled and scratch are equal within 0.005 nats at equal tokens (1 M): 3.501 against 3.500"),
        (math.nan, 3.5, "Distilled and scratch cannot be compared, a run diverged: nan against 3.500"),
    ],
)
def test_headline_whichever_way_it_comes_out(distilled: float, scratch: float, expected: str):
    numbers = measured(distilled=distilled, scratch=scratch)
    assert reporting.headline(numbers) == expected + " nats per token"
    assert expected in reporting.render_markdown(numbers)


def test_headline_admits_unequal_tokens():
    numbers = measured()
    numbers["scratch"]["tokens"] = 1_500_000
    assert "at unequal tokens (1 M against 1.5 M)" in reporting.headline(numbers)


def test_page_says_what_each_step_did():
    page = reporting.render_markdown(measured())
    assert "Pruning took 50% of the parameters (6 M to 3 M) and moved the validation loss from 3.200 to 5.900" in page
    assert "moved it to 3.400: 93% of the loss won back." in page
    assert "| distilled | 3,000,000 | 2,475,712 | 3.400 | 30.0 | 1,000,000 | 125 | 8,000 |" in page
    assert "| pruned | 3,000,000 | 2,475,712 | 5.900 | 365.0 | 0 | 0 | - |" in page
    assert "- teacher: `M-M*-M-M*-`" in page
    assert "- torch: 2.11.0" in page


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (measured(pruned=3.5, distilled=3.6), "moved it to 3.600: worse than before it."),
        (measured(distilled=3.1), "104% of the loss won back, and below the teacher's."),
        (measured(pruned=3.1, distilled=3.0), "moved it to 3.000, and below the teacher's."),
    ],
)
def test_page_says_so_when_distillation_surprises(numbers: dict[str, Any], expected: str):
    assert expected in reporting.render_markdown(numbers)


def test_writes_three_files_and_nothing_else(tmp_path: Path):
    numbers = measured()
    untouched = copy.deepcopy(numbers)
    for _ in range(2):  # the second replaces the first
        reporting.write_report(tmp_path / "run", numbers)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.json", "report.md", "report.png"]
    assert json.loads((tmp_path / "run/report.json").read_text()) == numbers == untouched
    assert imread(tmp_path / "run/report.png").shape == (780, 1650, 4)


def test_the_picture_is_labelled():
    figure = reporting._draw_report(measured())
    words = [text.get_text() for ax in figure.axes for text in ax.texts]
    for label in ("teacher 3.200", "just pruned 5.900", "pruned 5.900", "distilled 3.400", "scratch 3.520"):
        assert label in words
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "tokens this model was trained on",
        "parameters, embeddings included",
    ]
    assert {ax.get_ylabel() for ax in figure.axes} == {"validation loss, nats per token"}


def test_labels_do_not_overlap(tmp_path: Path):
    figure = reporting._draw_report(measured(teacher=3.4, pruned=3.41, distilled=3.4005, scratch=3.4))
    figure.savefig(tmp_path / "drawn.png")
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts if "3.4" in text.get_text()]
        assert len(boxes) == 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["teacher", "pruned", "distilled", "scratch"])
def test_a_diverged_run_is_reported_all_the_same(name: str, bad: float, tmp_path: Path):
    reporting.write_report(tmp_path, measured(**{name: bad}))
    assert json.loads((tmp_path / "report.json").read_text())[name]["val_loss"] is None
    assert f"| {name} | " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_report_without_history_still_draws(tmp_path: Path):
    numbers = measured()
    for name in reporting.VARIANTS:
        del numbers[name]["history"]
    reporting.write_report(tmp_path, numbers)
    assert (tmp_path / "report.png").exists()


def test_missing_measurements_are_named_and_nothing_is_written(tmp_path: Path):
    numbers = measured()
    del numbers["distilled"]["val_loss"], numbers["distilled"]["pattern"]
    with pytest.raises(DataError, match="distilled without val_loss, pattern"):
        reporting.write_report(tmp_path / "run", numbers)
    del numbers["distilled"]
    with pytest.raises(DataError, match="distilled without params"):
        reporting.write_report(tmp_path / "run", numbers)
    assert not (tmp_path / "run").exists()


def test_page_says_on_which_tokens_losses_were_measured():
    numbers = measured()
    assert "nats per token.  Tokens" in reporting.render_markdown(numbers)
    numbers["validation"] = {"split": "validation", "tokens": 65_536, "tokens while training": 16_384}
    page = reporting.render_markdown(numbers)
    assert "nats per token, of all 65,536 tokens of the validation split." in page
    assert "on 16,384 of them" in page


def test_the_loss_of_the_whole_split_is_no_point_of_a_curve():
    """Which was measured on a part of it while the model trained."""
    ax = reporting._draw_report(measured()).axes[0]
    curves = {line.get_color(): list(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 3}
    history = [row["val_loss"] for row in measured()["distilled"]["history"]]
    assert curves[reporting.COLORS["distilled"]] == history
