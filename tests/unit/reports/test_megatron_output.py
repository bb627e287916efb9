import logging
import warnings
from pathlib import Path

import pytest

from megatron_ext.reports.megatron_output import VERBOSE, MegatronOutput, is_suppressed, say, suppressed_output


def everything_at_once() -> None:
    """What Megatron does, and a line of ours."""
    print("a parameter")
    logging.getLogger("megatron.core").warning("deprecated")
    warnings.warn("experimental", stacklevel=1)
    say("ours")


@pytest.mark.filterwarnings("default")
def test_it_goes_into_a_file_and_ours_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers, show = logging.getLogger().handlers[:], warnings.showwarning
    with MegatronOutput() as output:
        assert is_suppressed()
        everything_at_once()
        output.write_to(tmp_path, 3)
        print("later")
    assert capsys.readouterr() == ("ours\n", "")
    kept = (tmp_path / "logs" / "megatron-rank-3.log").read_text()
    for text in ("a parameter\n", "WARNING megatron.core: deprecated\n", "experimental", "later\n"):
        assert text in kept
    assert not is_suppressed()
    assert logging.getLogger().handlers == handlers
    assert warnings.showwarning is show
    print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_a_warning_of_ours_is_seen_on_any_rank(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("megatron_ext.somewhere")
    with pytest.MonkeyPatch.context() as patch, MegatronOutput():
        patch.setattr(logging.getLogger("megatron_ext"), "propagate", True)  # as on every rank but the first
        logger.warning("an image is left out")
    assert "an image is left out" in capsys.readouterr().err


def test_a_resumed_run_adds_to_its_file(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with MegatronOutput() as output:
            output.write_to(tmp_path, 0)
            print(text)
    assert (tmp_path / "logs" / "megatron-rank-0.log").read_text() == "first\nsecond\n"


def end_with(error: BaseException, *lines: str, directory: Path | None = None) -> None:
    with MegatronOutput() as output:
        if directory is not None:
            output.write_to(directory, 0)
        for line in lines:
            print(line)
        raise error


def test_before_a_failure_its_last_lines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"):
        end_with(ValueError("broken"), *(f"line {number}" for number in range(100)))
    err = capsys.readouterr().err
    assert "line 99\n" in err
    assert "line 50\n" not in err


def test_before_a_failure_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"):
        end_with(ValueError("broken"), directory=tmp_path)
    assert f"what Megatron has said before is in {tmp_path}/logs/megatron-rank-0.log" in capsys.readouterr().err


def test_an_end_that_is_meant_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end_with(SystemExit(0), "line")
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_quiet_blocks_may_lie_in_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    with suppressed_output():
        with suppressed_output():
            everything_at_once()
        print("is_suppressed, too")
        say("still ours")
    assert capsys.readouterr() == ("ours\nstill ours\n", "")


def test_all_of_it_can_be_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(VERBOSE, "1")
    with suppressed_output(), MegatronOutput() as output:
        output.write_to(Path("nowhere"), 0)
        print("a parameter")
    assert capsys.readouterr().out == "a parameter\n"
    assert not Path("nowhere").exists()
