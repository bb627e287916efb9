"""Weights that are gathered while the forward pass runs: whoever reads one waits for it, and nothing else changes."""

import json

import fork_server
import pytest
import torch
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext.checkpoint.reader import CheckpointReader
from tests.functional.test_distill import STATES, STUDENT

# The output layer has a bucket of its own, as that of a large vocabulary has.
SHARDED = ["--use-distributed-optimizer", "--ddp-bucket-size", "1000", "--untie-embeddings-and-output-weights"]
OVERLAPPED = ["--overlap-grad-reduce", "--overlap-param-gather"]
TWICE = ["--micro-batch-size", "2"]  # two micro-batches at each of two ranks: only the last one's gradients are reduced
# As for an output layer whose gradient is too large to be kept until the backward pass.
LARGE = """
import runpy, sys
from megatron_ext.lm_head import fused_loss
fused_loss.KEPT["cpu"] = 0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["distill_gpt.py", "pretrain_hybrid.py"])
def test_overlapping_changes_nothing(workspace: Workspace, teacher: str, program: str) -> None:
    (workspace.path / "large.py").write_text(LARGE)
    model = [*STUDENT, *STATES, "--distill-teacher", teacher] if program == "distill_gpt.py" else MODEL
    runs = [f"{program} {'together' if flags else 'in turn'}" for flags in ([], OVERLAPPED)]
    for save, flags in zip(runs, ([], OVERLAPPED), strict=True):
        command = [workspace.path / "large.py", ROOT / program, *model, *workspace.data, *TRAIN, *TWICE]
        command += ["--train-iters", "3"]
        done = fork_server.run([*command, *SHARDED, *flags, "--save", save], 2, workspace.path)
        assert done.returncode == 0, done.stderr[-4000:]
    in_turn, together = (workspace.metrics(save) for save in runs)
    assert len(together) == 3
    for before, after in zip(in_turn, together, strict=True):
        for key in {"loss", "grad_norm", "val_loss", "kd_loss", "states_loss"} & before.keys():
            assert after[key] == pytest.approx(before[key], rel=1e-6), key
    left, right = (CheckpointReader(workspace.path / save) for save in runs)
    for key in left.shapes:
        torch.testing.assert_close(right.read(key), left.read(key), rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "gathered meanwhile": [*MODEL, *OVERLAPPED],
    # Buckets are padded, and the state of a parameter lies elsewhere in the padded buffer.
    "many buckets": [*MODEL, *OVERLAPPED, *SHARDED],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bit_exact(workspace: Workspace, name: str) -> None:
    """In the first step of a process nothing is gathered meanwhile; it computes what every other step does."""
    flags = [*LAYOUTS[name], *workspace.data, *TRAIN, *TWICE, "--use-distributed-optimizer", "--train-iters", "3"]
    workspace.run("pretrain_hybrid.py", *flags, "--save", f"{name}, straight", ranks=2)
    halves = [*flags, "--save", f"{name}, halves", "--load", f"{name}, halves"]
    workspace.run("pretrain_hybrid.py", *halves, "--exit-interval", "2", ranks=2)
    workspace.run("pretrain_hybrid.py", *halves, ranks=2)
    left, right = (CheckpointReader(workspace.path / f"{name}, {part}") for part in ("straight", "halves"))
    for key in left.shapes:
        assert torch.equal(left.read(key), right.read(key)), key


# Which calls have the norm inside, and how many times a norm is called by itself.
COUNTED = """
import json, os, runpy, sys
from megatron_ext.ops import mamba_ssm_api as api
inside, combined, forward = [], api.mamba_split_conv1d_scan_combined, api.RMSNorm.forward
apart = []
def counted(*args, **kwargs):
    inside.append(kwargs.get("rmsnorm_weight") is not None)
    return combined(*args, **kwargs)
def norm(*args):
    apart.append(1)
    return forward(*args)
api.mamba_split_conv1d_scan_combined, api.RMSNorm.forward = counted, norm
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("calls " + os.environ["RANK"], "w") as file:
        json.dump([sum(inside), len(inside), len(apart)], file)
"""


def test_the_norm_stays_in_one_operation_with_its_scan(workspace: Workspace) -> None:
    """Data parallelism's hooks on a norm do not take it out: the memory estimate counts on that."""
    (workspace.path / "counted.py").write_text(COUNTED)
    flags = [*MODEL, *workspace.data, *TRAIN, *TWICE, "--train-iters", "2", "--save", "counted", *SHARDED, *OVERLAPPED]
    command = [workspace.path / "counted.py", ROOT / "pretrain_hybrid.py", *flags, "--eval-interval", "9"]
    done = fork_server.run(command, 2, workspace.path)
    assert done.returncode == 0, done.stderr[-4000:]
    layers, micro_batches, steps = 2, 2, 2
    calls = layers * micro_batches * (steps + 1)  # and a validation at the end
    for rank in range(2):
        assert json.loads((workspace.path / f"calls {rank}").read_text()) == [calls, calls, 0]
