"""Benchmarks that train run to their end; what they measure is not looked at."""

import json
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
