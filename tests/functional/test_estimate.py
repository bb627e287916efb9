"""`megatron-ext estimate` as it is typed: the flags of a training run, and nothing else."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import fork_server
import pytest
from memory import teacher_flags
from workspace import HAS_GPU, ROOT

from megatron_ext.errors import ConfigError
from megatron_ext.estimate import main, table
from megatron_ext.models.presets import PRESETS
from megatron_ext.models.training_cost import training_flops_per_token

COMMAND = [sys.executable, "-c", "import sys; from megatron_ext.cli import main; sys.exit(main())", "estimate"]


def test_estimate(tmp_path) -> None:
    flags = ["--preset", "llama3.1-8b", "--bf16", "--use-distributed-optimizer", "--tensor-model-parallel-size", "2"]
    flags += ["--sequence-parallel", "--seq-length", "4096", "--global-batch-size", "128", "--train-iters", "1000"]
    own = ["--gpus", "16", "--gpu", "h200", "--efficiency", "0.5", "--dollars-per-gpu-hour", "3", "--json"]
    environment = os.environ | {"MEGATRON_EXT_DEVICE": "cpu"}
    done = subprocess.run(
        [*COMMAND, *own, "--teacher", "mamba2-hybrid-8b", *flags],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []
    found = json.loads(done.stdout)
    arch = PRESETS["llama3.1-8b"].architecture
    assert found["parameters"] == arch.num_parameters()
    assert found["flops_per_token"] > training_flops_per_token(arch, 4096)
    parts = {"weights", "gradients", "optimizer", "activations", "working", "distillation"}
    assert found["memory_bytes"].keys() == parts
    assert found["fits"]
    step = sum(found["step_seconds"].values())
    assert found["days"] == pytest.approx(1000 * step / 86400)
    assert found["dollars"] == pytest.approx(found["days"] * 24 * 16 * 3)
    assert found["tokens_per_second"] == pytest.approx(128 * 4096 / step)
    assert found["mfu"] < 0.5
    shown = table(found)
    assert "16 x h200" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.skipif(HAS_GPU, reason="the meter counts the bytes of tensors on a CPU")
@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("Transformer, one process", 1),
        ("Mamba-2, one process", 1),
        ("hybrid, recomputed", 1),
        ("hybrid, tensor 2, sequence parallel", 2),
        ("hybrid, pipeline 2", 2),
    ],
)
def test_memory_is_within_a_tenth_of_the_measured_peak(tmp_path: Path, case: str, processes: int) -> None:
    """A count of bytes, the same on every machine; `benchmarks/memory.py` has more cases."""
    command = [ROOT / "benchmarks" / "memory.py", "--child", tmp_path, case, "256", "128"]
    done = fork_server.run(command, processes, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    ratio = sum(ranks[0]["estimate"].values()) / max(rank["peak"] for rank in ranks)
    print(f"{case}: {ratio:.3f}")
    assert 0.9 < ratio < 1.1


@pytest.mark.skipif(HAS_GPU, reason="the meter counts the bytes of tensors on a CPU")
def test_the_memory_of_a_distillation_is_within_a_tenth_of_the_measured_peak(tmp_path: Path) -> None:
    """With a teacher that is trained, too."""
    case, sizes, out = "hybrid, the same while the teacher is corrected", (256, 128), tmp_path / "out"
    out.mkdir()
    made = teacher_flags(case, *sizes, tmp_path / "teacher")
    done = fork_server.run([ROOT / "pretrain_hybrid.py", *made], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [ROOT / "benchmarks" / "memory.py", "--child", out, case, *map(str, sizes)]
    done = fork_server.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "0.json").read_text())
    assert 0.9 < sum(found["estimate"].values()) / found["peak"] < 1.1


def test_a_wrong_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        main(Namespace(gpus=0, efficiency=0.5))
