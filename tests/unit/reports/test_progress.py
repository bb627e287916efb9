"""Progress: lines now and then where there is no terminal, a bar where there is one."""

import io

import pytest

from megatron_ext.reports import progress
from megatron_ext.reports.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("RANK", raising=False)
    return now


def test_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", 3000) as shown:
        for clock[0] in (1.0, 9.0, 11.0, 12.0, 22.0):
            shown.advance(500)
    captured = capsys.readouterr()
    assert captured.err == "scoring: 1,500 of 3,000, 0.2 min left\nscoring: 2,500 of 3,000, 0.1 min left\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (2_500_000, 40_000_000, "converted: 2 of 40 MB, 7 tokens"),
        (250_000_000, 4_000_000_000, "converted: 0.25 of 4.00 GB, 7 tokens"),
    ],
)
def test_bytes_and_a_total_that_comes_later(clock: list[float], done: int, total: int, line: str) -> None:
    shown = Progress("converted", unit="bytes")
    shown.update(done, total, "7 tokens")
    assert str(shown) == line
    assert shown.total == total


def test_without_a_total(clock: list[float]) -> None:
    shown = Progress("evaluation")
    shown.update(3, note="loss 2.5")
    assert str(shown) == "evaluation: 3, loss 2.5"


def test_other_ranks_are_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Progress("scoring", 3) as shown:
        clock[0] = 100
        shown.advance()
    assert capsys.readouterr().err == ""
    asked = Progress("scoring", 3, shows=True)
    clock[0] = 200
    asked.advance()
    assert capsys.readouterr().err == "scoring: 1 of 3, 3.3 min left\n"


@pytest.mark.parametrize("unit", ["", "bytes"])
def test_a_bar_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("training", 40, start=20, unit=unit) as shown:  # type: ignore[arg-type]
        shown.update(30, note="loss 1.25")
        clock[0] = 100
    assert "training" in terminal.getvalue()
    assert "30/40" in terminal.getvalue()
    assert "loss 1.25" in terminal.getvalue()
