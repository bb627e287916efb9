"""Benchmarks that train run to their end; what they measure is not looked at."""

import json
import os
import sys
import time
from pathlib import Path

import fork_server
import pytest
from workspace import HAS_GPU, MODEL, ROOT

FLAGS = [
    *MODEL, "--hybrid-layer-pattern=*-*-", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127",
    "--seq-length", "32", "--global-batch-size", "2", "--lr", "1e-3", "--eval-iters", "0", "--train-iters", "5",
]  # fmt: skip


@pytest.mark.skipif(HAS_GPU, reason="the peer on a GPU is made of other packages")
@pytest.mark.parametrize(("kind", "flags"), [("ours", []), ("peer", ["--transformer-impl", "local"])])
def test_pretraining_is_timed_step_by_step(tmp_path: Path, kind: str, flags: list[str]) -> None:
    out = tmp_path / "out.json"
    done = fork_server.run([ROOT / "benchmarks" / "pretrain.py", "--child", out, kind, "1", *FLAGS, *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found["seconds"]) == 2  # of five: two of warm-up, and the last one has no end
    assert found["tokens"] == 64
    assert found["peak_bytes"] > 12 * found["parameters"]  # weights, gradients and Adam's states are held at once
    assert found["model"] == ("GPTModel" if kind == "peer" else "HybridModel")


def test_speeds_of_two_ranks_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "speeds.json"
    done = fork_server.run([ROOT / "benchmarks" / "scaling.py", "--speeds", out], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text()).keys() == {"flops", "link"}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_a_stage_that_takes_too_long_ends_with_all_it_started(suite, tmp_path: Path) -> None:
    """What it had written counts."""
    code = (
        "import pathlib, subprocess, sys, time; out = pathlib.Path(sys.argv[1]); (out / 'early.json').write_text('1'); "
    )
    code += "(out / 'pid').write_text(str(subprocess.Popen(['sleep', '60']).pid)); time.sleep(60)"
    stage = suite.Stage("slow", 60, [sys.executable, "-c", code, "OUT"])
    out = tmp_path / "out"
    out.mkdir()
    found = suite.run(stage, 2, False, out, tmp_path / "gpu.log")
    assert found["ended"] == "stopped after 2 s"
    assert suite.files(out)["early.json"] == "1"
    child, until = Path(f"/proc/{(out / 'pid').read_text()}/stat"), time.monotonic() + 20
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.1)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_results_of_a_run_are_written_where_they_belong(suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their names say."""
    (tmp_path / "here" / "results").mkdir(parents=True)
    (tmp_path / "here" / "performance_page.py").touch()
    monkeypatch.setattr(suite, "HERE", tmp_path / "here")
    report = tmp_path / "gpu.json"
    report.write_text(json.dumps({"stages": {}, "files": {"a.json": "{}", "../b.json": "{}", "c.py": "", "d.xml": ""}}))
    suite.merge(report)
    assert sorted(os.listdir(tmp_path / "here" / "results")) == ["a.json", "b.json"]
    assert sorted(os.listdir(tmp_path / "here")) == ["performance_page.py", "results"]
