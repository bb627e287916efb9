"""Flags of the data, the loss and the optimizer that are said to change the result do: two steps with and without."""

import json
from pathlib import Path

import fork_server
import numpy as np
import pytest
from workspace import MODEL, Workspace

# Records what two steps come to, and leaves no run directory behind.
PROGRAM = """
import json, sys
from megatron_ext.training.launch import Job, launch
from megatron_ext.training.program import main
found = []
def run():
    started = launch(Job("pretrain"))
    import megatron.training.training as training
    from megatron_ext.training.run import train
    step = training.train_step
    def recorded(*args, **kwargs):
        result = step(*args, **kwargs)
        found.append([{name: float(value) for name, value in result[0].items()}, float(result[5])])
        found.append(sum(float(p.detach().double().abs().sum()) for chunk in args[2] for p in chunk.parameters()))
        return result
    training.train_step = recorded
    train(started)
status = main(run)
print("found", json.dumps(found))
sys.exit(status)
"""
CHANGE = (
    "--eod-mask-loss", "--seed 7", "--split 50,50,0", "--dataloader-type cyclic", "--init-method-std 0.1",
    "--hidden-dropout 0.3", "--weight-decay 0.9", "--adam-eps 0.1", "--optimizer sgd",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_steps(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory):
    program = tmp_path_factory.mktemp("flags") / "program.py"
    program.write_text(PROGRAM)
    common = [*MODEL, *workspace.data, "--lr", "1e-2", "--train-iters", "2", "--eval-iters", "0"]

    def run(*flags: str) -> list:
        done = fork_server.run([Path(program), *common, *flags], 1, workspace.path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition("found ")[2])

    return run


def test_flags_that_are_accepted_have_an_effect(two_steps, workspace: Workspace) -> None:
    # Every document in the corpus is longer than a row, so the token that is masked is a frequent one.
    tokens = np.fromfile(workspace.path / "data/text_document.bin", dtype=np.uint16)
    masked = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "511"]
    masked += ["--null-tokenizer-eod-id", str(np.bincount(tokens).argmax())]
    plain = two_steps(*masked)
    assert len(plain) == 4
    same = [flag for flag in CHANGE if two_steps(*masked, *flag.split()) == plain]
    assert same == []
