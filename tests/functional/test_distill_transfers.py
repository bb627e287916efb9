"""What pipeline stages hand on has a shape that both sides know: none of them waits to be told."""

import json
from pathlib import Path

import fork_server
import pytest
from workspace import ROOT, TRAIN, Workspace

from tests.functional.test_distill import PP, SMALLER, STATES, STUDENT, TP

# Counts how often stages tell each other a shape, and what they send.
COUNTED = """
import json, os, runpy, sys
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator as Communicator
told, tensors, tell, send = [], [], Communicator._communicate_shapes, Communicator._communicate
def counted(self, *args, **kwargs):
    told.append(1)
    return tell(self, *args, **kwargs)
def sent(self, *, tensor_send_next, **kwargs):
    tensors.extend([] if tensor_send_next is None else [tuple(tensor_send_next.shape)])
    return send(self, tensor_send_next=tensor_send_next, **kwargs)
Communicator._communicate_shapes, Communicator._communicate = counted, sent
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("shapes " + os.environ["RANK"], "w") as file:
        json.dump([len(told), sorted(set(tensors))], file)
"""
TWO_STAGES = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*TWO_STAGES, "--hybrid-layer-pattern=M|-|*|-"]
# Student and teacher, both wide; the states that wait for their partner; and what losses came to, in three parts.
BESIDE = 32 + 64
CASES = {
    "a teacher beside it": ([*TWO_STAGES], BESIDE, True),
    "states, in 16 bits": ([*TWO_STAGES, *STATES, "--bf16"], None, True),
    "a teacher elsewhere": ([*TWO_STAGES, TP, "2", PP, "1"], 32, True),
    "virtual stages, a teacher elsewhere": ([*VIRTUAL, TP, "2", PP, "1"], 32, True),
    "virtual stages, a teacher beside it": ([*VIRTUAL], BESIDE, False),
}


@pytest.mark.parametrize("name", CASES)
def test_no_stage_is_told_a_shape_that_it_can_know(
    workspace: Workspace, teacher: str, tmp_path: Path, name: str
) -> None:
    flags, width, known = CASES[name]
    (workspace.path / "shapes.py").write_text(COUNTED)
    command = [*STUDENT, *flags, "--distill-teacher", teacher, *workspace.data, *TRAIN, *SMALLER]
    command += ["--train-iters", "1"]
    done = fork_server.run(
        [workspace.path / "shapes.py", ROOT / "distill_gpt.py", *command, "--save", tmp_path / "run"], 2, workspace.path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told, shapes = json.loads((workspace.path / "shapes 0").read_text())
    assert (told == 0) == known
    assert len(shapes) == 1
    sequence, batch, sent = shapes[0]
    assert (sequence, batch) == (64, 2)
    assert sent == width if width is not None else sent > BESIDE
