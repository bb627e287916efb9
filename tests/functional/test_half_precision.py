"""16 bits: every program runs in them, and what they find is what 32 bits find, but for the rounding of the model."""

import sys
from pathlib import Path

import fork_server
import pytest
import torch
from workspace import MODEL, TRAIN, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.lm_head.divergences import names
from tests.functional.test_distill import PP, STATES, STUDENT, TP

COMMAND = str(Path(sys.executable).parent / "megatron-ext")
TWO_STEPS = [*TRAIN, "--train-iters", "2"]
FP16 = ["--fp16", "--initial-loss-scale", "1024"]
WITH_STATES = {
    "teacher elsewhere, distributed optimizer": [
        *STATES, "--bf16", TP, "2", "--use-distributed-optimizer", "--overlap-grad-reduce",
    ],
    "pp2, corrected": [
        *STATES, "--bf16", "--pipeline-model-parallel-size", "2", "--distill-correct-teacher", "together",
    ],
}  # fmt: skip
WITHOUT = {
    "tp2, sequence parallel": ["--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "fp16, pp2": [*FP16, "--pipeline-model-parallel-size", "2"],
    "fp16, teacher elsewhere": [*FP16, PP, "2"],
}


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> str:
    """A model after four steps in bf16."""
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--bf16", "--save", "bf16", "--lr", "5e-3"]
    workspace.run("pretrain_hybrid.py", *flags, "--use-distributed-optimizer", ranks=2)
    return "bf16"


@pytest.fixture(scope="module")
def distilled(workspace: Workspace, teacher: str) -> str:
    """Two steps of a student in fp32."""
    workspace.run("pretrain_hybrid.py", *STUDENT, *workspace.data, *TWO_STEPS, "--save", "half-student")
    return distil(workspace, teacher, "half-reference", *STATES)


def distil(workspace: Workspace, teacher: str, save: str, *flags: str, ranks: int = 1) -> str:
    common = [*STUDENT, "--pretrained-checkpoint", "half-student", "--distill-teacher", teacher, "--save", save]
    workspace.run("distill_gpt.py", *common, *workspace.data, *TWO_STEPS, *flags, ranks=ranks)
    return save


def test_bfloat16_trains(workspace: Workspace, trained: str) -> None:
    losses = [step["loss"] for step in workspace.metrics(trained)]
    assert losses[-1] < losses[0] - 0.05


def test_a_fused_cross_entropy_is_the_same(workspace: Workspace, trained: str) -> None:
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--bf16", "--save", "fused", "--lr", "5e-3"]
    more = ["--use-distributed-optimizer", "--cross-entropy-loss-fusion"]
    workspace.run("pretrain_hybrid.py", *flags, *more, ranks=2)
    for key in ("loss", "grad_norm"):
        got, expected = ([step[key] for step in workspace.metrics(run)] for run in ("fused", trained))
        assert got == pytest.approx(expected, rel=1e-3), key


@pytest.mark.parametrize("name", [*WITH_STATES, *WITHOUT])
def test_distillation_finds_what_it_finds_in_32_bits(
    workspace: Workspace, teacher: str, distilled: str, name: str
) -> None:
    """The first step is that of the same weights; a loss that was itself rounded to bf16 would be off by 2e-3."""
    flags = WITH_STATES.get(name) or WITHOUT[name]
    expected, got = (workspace.metrics(run) for run in (distilled, distil(workspace, teacher, name, *flags, ranks=2)))
    assert len(got) == 2
    assert got[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
    assert got[0]["kd_loss"] == pytest.approx(expected[0]["kd_loss"], rel=1e-3)
    assert got[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-2)
    if name in WITH_STATES:
        for step, reference in zip(got, expected, strict=True):
            assert step["states_loss"] == pytest.approx(reference["states_loss"], rel=5e-3)
        assert got[1]["total_loss"] == pytest.approx(expected[1]["total_loss"], rel=1e-2)
    assert got[1]["kd_loss"] < got[0]["kd_loss"]


@pytest.mark.parametrize("loss", sorted({*names()} - {"forward-kl", "top-k-rest"}))
def test_every_other_loss_learns(workspace: Workspace, teacher: str, distilled: str, loss: str) -> None:
    """Those that no other test here has; what they are in 16 bits is compared in `unit/lm_head/test_losses.py`."""
    more = ["--bf16", "--distill-loss", loss, "--eval-iters", "0"]
    first, second = workspace.metrics(distil(workspace, teacher, f"bf16-{loss}", *more))
    assert first["loss"] == pytest.approx(workspace.metrics(distilled)[0]["loss"], rel=1e-4)
    assert 0 < second["kd_loss"] < first["kd_loss"]


def test_what_was_trained_in_bfloat16_goes_the_whole_way(workspace: Workspace, trained: str) -> None:
    """Cut, taught from a cache of what it was cut from, measured, continued and exported."""
    half = [*workspace.data, "--bf16", "--split", "2,1,97"]
    cut = ["--prune-samples", "8", "--prune-hidden-size", "48", "--prune-ffn-hidden-size", "64"]
    workspace.run("prune_gpt.py", "--load", trained, "--save", "bf16-pruned", *half, *cut)
    write = ["--distill-cache-write", "bf16-cache", "--distill-top-k", "64"]
    workspace.run("distill_gpt.py", "--distill-teacher", trained, *write, *half)
    learn = ["--distill-cache", "bf16-cache", "--pretrained-checkpoint", "bf16-pruned", "--save", "bf16-distilled"]
    workspace.run("distill_gpt.py", *learn, *half, *TWO_STEPS, "--use-distributed-optimizer", ranks=2)
    first, second = workspace.metrics("bf16-distilled")
    assert 0 < second["kd_loss"] < first["kd_loss"] < 1
    weights = CheckpointReader(workspace.path / "bf16-distilled")
    assert {weights.read(key).dtype for key in weights.shapes} == {torch.bfloat16}
    assert layout.architecture(weights.step.path).hidden_size == 48
    (workspace.path / "half.jsonl").write_text('{"text": "import os\\nimport sys\\n"}\n' * 4)
    for words, said in (
        (["evaluate", "bf16-distilled", "--text", "half.jsonl"], "nats per token"),
        (["generate", "bf16-distilled", "--prompt", "def", "--max-new-tokens", "3"], "def"),
        (["convert", "--from", "megatron", "--to", "hf", "bf16-distilled", "hf16", "--verify"], "largest difference"),
    ):
        done = fork_server.run([COMMAND, *words], cwd=workspace.path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert said in done.stdout
