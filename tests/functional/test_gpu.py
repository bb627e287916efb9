"""On a GPU: pre-training, resuming, pruning, distilling, generating, measuring and exporting, as people start them.

In bf16, on sizes that our Triton kernels take. Programs that do not need each other run side by side, so that the file
takes four of their starts in a row. With `MEGATRON_EXT_GPU_TESTS=here` it runs wherever it is started, as a rehearsal:
`MEGATRON_EXT_GPU_TESTS=here MEGATRON_EXT_DEVICE=cpu pytest tests/functional/test_gpu.py`.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from workspace import ROOT, Workspace, checked

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader

pytestmark = [] if os.environ.get("MEGATRON_EXT_GPU_TESTS") == "here" else pytest.mark.gpu

MODEL = [
    "--hybrid-layer-pattern=M-*-M-", "--hidden-size", "256", "--ffn-hidden-size", "512", "--num-attention-heads", "4",
    "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "64", "--mamba-num-heads", "8",
    "--mamba-head-dim", "64", "--mamba-state-dim", "128", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope", "--max-position-embeddings", "256",
]  # fmt: skip
TRAIN = [
    "--lr", "2e-3", "--lr-decay-style", "constant", "--clip-grad", "1.0", "--eval-iters", "1", "--eval-interval", "10",
    "--save-interval", "10",
]  # fmt: skip
SHAPE = ["--split", "95,5,0", "--seq-length", "256", "--micro-batch-size", "2", "--global-batch-size", "8"]
HALF, EXACT = ["--bf16"], ["--bf16", "--deterministic-mode"]
PRETRAIN, PRUNE, DISTIL, JOB = ["pretrain_hybrid.py"], ["prune_gpt.py"], ["distill_gpt.py"], ["-m", "megatron_ext"]
SKIP = ["--pretrained-checkpoint", "taught", "--skip-train", "--save-interval", "1"]
CONTINUE = ["generate", "taught", "--prompt", "import os\n", "--prompt", "def", "--max-new-tokens", "8", "--ignore-eos"]
MEASURE = ["evaluate", "taught", "--text", "text.py", "--window", "256"]
# Name: the command line, whether it trains, what has to be there first, and where it runs if not on the GPU.
PROGRAMS: dict[str, tuple[list[str], bool, tuple[str, ...], str]] = {
    "taught": ([*PRETRAIN, *MODEL, *TRAIN, *HALF, "--train-iters", "5", "--save", "taught"], True, (), ""),
    "straight": ([*PRETRAIN, *MODEL, *TRAIN, *EXACT, "--train-iters", "5", "--save", "straight"], True, (), ""),
    "stopped": (
        [*PRETRAIN, *MODEL, *TRAIN, *EXACT, "--train-iters", "5", "--exit-interval", "3", "--save", "resumed"],
        True, (), "",
    ),
    "resumed": (
        [*PRETRAIN, *TRAIN, *EXACT, "--train-iters", "5", "--load", "resumed", "--save", "resumed"],
        True, ("stopped",), "",
    ),
    "pruned": (
        [*PRUNE, "--load", "taught", "--save", "pruned", *HALF, "--prune-samples", "16",
         "--prune-target-params", "0.6"],
        True, ("taught",), "",
    ),
    "distilled": (
        [*DISTIL, "--distill-teacher", "taught", "--pretrained-checkpoint", "pruned", "--save", "distilled", *TRAIN,
         *HALF, "--lr", "3e-4", "--train-iters", "3"],
        True, ("pruned",), "",
    ),
    "loss": ([*PRETRAIN, *SKIP, "--save", "loss"], True, ("taught",), ""),
    "loss on a CPU": ([*PRETRAIN, *SKIP, "--save", "loss on a CPU"], True, ("taught",), "cpu"),
    "text": ([*JOB, *MEASURE, "--save", "text"], False, ("taught",), ""),
    "text on a CPU": ([*JOB, *MEASURE, "--save", "text on a CPU"], False, ("taught",), "cpu"),
    "continued": ([*JOB, *CONTINUE, "--output", "continued.jsonl"], False, ("taught",), ""),
    "continued in fp32": (
        [*JOB, *CONTINUE, "--dtype", "float32", "--output", "continued in fp32.jsonl"], False, ("taught",), "",
    ),
    "continued on a CPU": (
        [*JOB, *CONTINUE, "--dtype", "float32", "--output", "continued on a CPU.jsonl"], False, ("taught",), "cpu",
    ),
    "exported": (
        [*JOB, "convert", "--from", "megatron", "--to", "hf", "taught", "exported", "--verify"], False, ("taught",), "",
    ),
}  # fmt: skip


class Programs:
    """All of `PROGRAMS`, each started once, when what it needs is there."""

    def __init__(self, workspace: Workspace, pool: ThreadPoolExecutor) -> None:
        self.workspace = workspace
        self._running: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        for name in PROGRAMS:  # in an order in which none waits for a later one, so that a full pool goes on
            self._running[name] = pool.submit(self._run, name)

    def __getitem__(self, name: str) -> subprocess.CompletedProcess[str]:
        """The program, ended as it should."""
        return self._running[name].result()

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        command, trains, before, device = PROGRAMS[name]
        for other in before:
            self[other]
        data = [*self.workspace.data, *SHAPE] if trains else []
        program = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # by default as many as there are cores, for each program
        environment |= {"PYTHONPATH": path_of_ours()} | ({"MEGATRON_EXT_DEVICE": device} if device else {})
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *program, *data], cwd=self.workspace.path, env=environment, capture_output=True, text=True
        )
        print(f"{name}: {time.perf_counter() - begun:.1f} s")
        return checked(done, ok=True)


@pytest.fixture(scope="module")
def programs(workspace: Workspace) -> Iterator[Programs]:
    """All programs, under way."""
    source = Path(json.__file__).with_name("scanner.py").read_text()
    (workspace.path / "text.py").write_text(source)
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        yield Programs(workspace, pool)


def path_of_ours() -> str:
    """PYTHONPATH without the peers of `benchmarks/peers.py`, which would run in the place of the kernels to test."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(e for e in entries if not Path(e, "mamba_ssm").is_dir() or Path(e, "megatron").is_dir())


def losses(programs: Programs, run: str) -> list[float]:
    return [step["loss"] for step in programs.workspace.metrics(run)]


def result(programs: Programs, run: str) -> dict[str, Any]:
    programs[run]
    return json.loads((programs.workspace.path / run / "results.json").read_text())


def continuations(programs: Programs, name: str) -> list[list[int]]:
    programs[name]
    lines = (programs.workspace.path / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens"] for line in lines]


def test_pretraining_learns(programs: Programs) -> None:
    programs["taught"]
    found = losses(programs, "taught")
    assert len(found) == 5
    assert found[0] == pytest.approx(math.log(512), abs=0.3)
    assert found[-1] < found[0] - 0.1


def test_a_run_goes_on_exactly(programs: Programs) -> None:
    """Bit for bit with deterministic kernels."""
    programs["straight"], programs["resumed"]
    straight, resumed = losses(programs, "straight"), losses(programs, "resumed")
    assert len(straight) == 5
    assert resumed == straight


def test_deterministic_kernels_find_what_the_fastest_find(programs: Programs) -> None:
    programs["straight"], programs["taught"]
    assert losses(programs, "taught") == pytest.approx(losses(programs, "straight"), rel=1e-3)


def test_the_loss_is_that_of_a_cpu(programs: Programs) -> None:
    """In fp32, of the whole validation set."""
    found = [result(programs, name)["val_loss"] for name in ("loss", "loss on a CPU")]
    assert found[0] == pytest.approx(found[1], abs=2e-4)


def test_a_pruned_model_has_the_size_asked_for(programs: Programs) -> None:
    programs["pruned"]
    steps = [layout.find(programs.workspace.path / name).path for name in ("pruned", "taught")]
    pruned, whole = (layout.architecture(step).num_parameters() for step in steps)
    assert 0.57 <= pruned / whole <= 0.6


def test_a_pruned_model_learns_from_the_whole(programs: Programs) -> None:
    programs["distilled"]
    steps = programs.workspace.metrics("distilled")
    assert len(steps) == 3
    for key in ("loss", "kd_loss", "grad_norm"):
        assert all(math.isfinite(step[key]) for step in steps), key
    assert 0 < steps[-1]["kd_loss"] < steps[0]["kd_loss"]
    weights = CheckpointReader(programs.workspace.path / "distilled")
    assert {weights.read(key).dtype for key in weights.shapes} == {torch.bfloat16}


def test_text_is_as_likely_as_on_a_cpu(programs: Programs) -> None:
    """In bf16, whose rounding differs."""
    found = [result(programs, name)["text"]["loss"] for name in ("text", "text on a CPU")]
    assert found[0] == pytest.approx(found[1], rel=3e-3)


def test_continuations_are_those_of_a_cpu(programs: Programs) -> None:
    """Token for token in fp32; as many in bf16."""
    assert [len(tokens) for tokens in continuations(programs, "continued")] == [8, 8]
    assert continuations(programs, "continued in fp32") == continuations(programs, "continued on a CPU")


def test_an_export_has_the_same_logits_in_transformers(programs: Programs) -> None:
    assert "largest difference" in programs["exported"].stdout
    assert (programs.workspace.path / "exported" / "config.json").is_file()
