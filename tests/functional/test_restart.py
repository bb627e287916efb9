"""A command that is started again goes on where the one before ended, and leaves nothing of what was lost."""

import shutil

import pytest
from workspace import MODEL, TRAIN, Workspace


def in_two_starts(workspace: Workspace, name: str, *flags: str) -> list[str]:
    """The command line of a run of two steps whose first start has ended after one."""
    command = [*flags, *workspace.data, *TRAIN, "--train-iters", "2", "--load", name, "--save", name]
    workspace.run("pretrain_hybrid.py", *command, "--exit-interval", "1")
    return command


def test_a_preset_with_a_tokenizer_goes_on(workspace: Workspace) -> None:
    """The tokenizer decides the vocabulary, so only once it is there can the models be compared."""
    data = [*workspace.data]
    del data[data.index("--padded-vocab-size") :][:2]
    small = ["--preset", "tiny-hybrid", "--hybrid-layer-pattern", "M-*-", "--hidden-size", "64"]
    preset = Workspace(workspace.path, data)
    command = in_two_starts(preset, "preset", *small)
    done = preset.run("pretrain_hybrid.py", *command, "--dry-run")
    assert "vocabulary 512" in " ".join(done.stdout.split())
    done = preset.run("pretrain_hybrid.py", *command, "--rotary-base", "500", ok=False)
    assert "rotary_base=500 instead of 10000" in done.stderr
    preset.run("pretrain_hybrid.py", *command)
    assert [(step["step"], step["tokens"]) for step in preset.metrics("preset")] == [(1, 512), (2, 1024)]
    measured = preset.run("pretrain_hybrid.py", *small, *data, "--skip-train", "--load", "preset")
    assert "validation loss" in measured.stdout


def test_a_run_that_is_finished_stays_as_it_is(workspace: Workspace, teacher: str) -> None:
    name = shutil.copytree(workspace.path / teacher, workspace.path / "finished").name
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--load", name]
    before = {path: path.stat().st_mtime_ns for path in (workspace.path / name).rglob("*")}
    for _ in range(2):
        done = workspace.run("pretrain_hybrid.py", *flags, "--save", name)
        assert "nothing is left to train: finished holds step 4" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (workspace.path / name).rglob("*")} == before
    done = workspace.run("pretrain_hybrid.py", *flags, "--save", "elsewhere", ok=False)
    assert "nothing is left to train" in done.stderr
    assert not (workspace.path / "elsewhere").exists()


def test_weights_of_a_late_step_do_not_count_as_steps_of_the_run(workspace: Workspace, teacher: str) -> None:
    """A crash before the first save: what it logged is dropped, also where the weights are of a later step."""
    flags = [*workspace.data, *TRAIN, "--pretrained-checkpoint", teacher, "--load", "crashed", "--save", "crashed"]
    (workspace.path / "crashed").mkdir()
    (workspace.path / "crashed" / "config.yaml").write_text("job: pretrain\n")
    (workspace.path / "crashed" / "metrics.jsonl").write_text('{"step": 1, "tokens": 512, "loss": 99.0}\n')
    (workspace.path / "crashed" / "iter_0000002").mkdir()  # and a save that was cut off
    workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "2")
    steps = workspace.metrics("crashed")
    assert [(step["step"], step["tokens"]) for step in steps] == [(1, 512), (2, 1024)]
    assert max(step["loss"] for step in steps) < 7


@pytest.mark.parametrize("given", [["--load", "fresh"], ["--load", "new", "--pretrained-checkpoint", "nowhere"]])
def test_what_is_not_there_is_named_with_its_flag(workspace: Workspace, given: list[str]) -> None:
    done = workspace.run(
        "pretrain_hybrid.py", *workspace.data, *TRAIN, *given, "--train-iters", "1", "--save", "new", ok=False
    )
    assert f"error: {given[-2]}: the checkpoint directory does not exist" in done.stderr
    assert not (workspace.path / "new").exists()
