"""A teacher that makes no sense stops the run, and the error says where, though nothing waits for it in between."""

import re

import fork_server
import pytest
import torch
from workspace import ROOT, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from tests.functional.test_distill import SMALLER, TWO_STEPS

# A teacher that is not finite from the second step on; each rank has two micro-batches in a step.
LATER = """
import runpy, sys, torch
from megatron_ext.distillation import model
losses, calls = model.distillation_losses, []
def later(*args, **kwargs):
    found = losses(*args, **kwargs)
    calls.append(1)
    broken = len(calls) > 2
    return found._replace(total=found.total * torch.nan, finite=~found.finite) if broken else found
model.distillation_losses = later
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_teacher_that_is_not_finite_stops_the_run(workspace: Workspace, teacher: str) -> None:
    """And the error names the sequences, as a cache of the teacher would."""
    whole = CheckpointReader(workspace.path / teacher)
    with writing(workspace.path / "nan-teacher", layout.architecture(whole.step.path)) as writer:
        for key in axes.tensors(layout.architecture(whole.step.path)):
            tensor = whole.read(key)
            writer.write(key, tensor.fill_(torch.nan) if key == "decoder.final_norm.weight" else tensor)
    flags = ["--distill-teacher", "nan-teacher", "--pretrained-checkpoint", teacher, "--save", "stopped by it"]
    done = workspace.run("distill_gpt.py", *flags, *workspace.data, *SMALLER, *TWO_STEPS, ok=False)
    assert done.returncode == 2
    assert "the teacher's logits are not finite on 2 of 2 sequences of a micro-batch" in done.stderr
    assert re.search(r"got: +[0-9a-f]{32}, [0-9a-f]{32} whose labels begin with \[\[", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags", [[], ["--overlap-grad-reduce", "--use-distributed-optimizer"]], ids=["", "overlapped"]
)
def test_the_error_is_ours_if_megatron_finds_gradients_first(
    workspace: Workspace, teacher: str, flags: list[str]
) -> None:
    """As it does where they are reduced before the last micro-batch ends, after the first step."""
    (workspace.path / "later.py").write_text(LATER)
    flags = [*flags, "--distill-teacher", teacher, "--pretrained-checkpoint", teacher, *workspace.data]
    flags += [*SMALLER, *TWO_STEPS]
    program = [workspace.path / "later.py", ROOT / "distill_gpt.py", "--rerun-mode", "disabled"]
    done = fork_server.run([*program, *flags, "--save", "later"], 2, workspace.path)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "the teacher's logits are not finite on 2 of 2 sequences of a micro-batch" in done.stderr
