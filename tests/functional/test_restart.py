"""A command that is started again goes on where the one before ended, and leaves nothing of what was lost."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext import cli
from megatron_ext.checkpoint import layout
from megatron_ext.demo import job


def in_two_starts(workspace: Workspace, name: str, *flags: str) -> list[str]:
    """The command line of a run of two steps whose first start has ended after one."""
    command = [*flags, *workspace.data, *TRAIN, "--train-iters", "2", "--load", name, "--save", name]
    workspace.run("pretrain_hybrid.py", *command, "--exit-interval", "1")
    return command


def test_a_preset_with_a_tokenizer_goes_on(workspace: Workspace) -> None:
    """The tokenizer decides the vocabulary, so only once it is there can the models be compared."""
    data = [*workspace.data]
    place = data.index("--padded-vocab-size")
    del data[place : place + 2]
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


def test_the_demo_goes_on_in_each_of_its_trainings(workspace: Workspace) -> None:
    """With the demo's own command lines, at a smaller size."""
    out = workspace.path / "demo"
    shutil.copytree(workspace.path / "data", out / "data")
    (out / "data" / "manifest.json").write_text('{"vocab_divisor": 8}')
    (out / "data" / "checksums.json").unlink()
    stages = {stage.directory.name: stage for stage in job.stages(out) if stage.steps}
    small = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "2", "--eval-iters", "0"]
    small += ["--lr-warmup-iters", "0", "--train-iters", "2"]
    for name in ("teacher", "distilled", "scratch"):
        command = [str(Path(sys.executable).with_name("megatron-ext")), *stages[name].words, *small]
        workspace.run(*command, "--exit-interval", "1")
        assert not stages[name].done
        workspace.run(*command)
        assert [step["step"] for step in workspace.metrics(f"demo/{name}")] == [1, 2]
        if name == "teacher":  # stands for the half, too
            shutil.copytree(out / "teacher", out / "pruned")


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


def test_a_run_that_was_killed_before_its_last_validation_makes_up_for_it(workspace: Workspace, teacher: str) -> None:
    """Every step is saved; no step is written again."""
    run = shutil.copytree(workspace.path / teacher, workspace.path / "unvalidated")
    expected = workspace.metrics(teacher)
    lines = [json.dumps({key: value for key, value in step.items() if "val" not in key}) for step in expected]
    (run / "metrics.jsonl").write_text("\n".join(lines[-1:]) + "\n")
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--save-interval", "3", "--load", run.name]
    before = {path: path.stat().st_mtime_ns for path in run.glob("iter_*/*")}
    workspace.run("pretrain_hybrid.py", *flags, "--save", run.name)
    assert workspace.metrics(run.name) == expected[-1:]
    assert {path: path.stat().st_mtime_ns for path in run.glob("iter_*/*")} == before
    done = workspace.run("pretrain_hybrid.py", *flags, "--save", run.name)
    assert "nothing is left to train" in done.stdout


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


FULL = """
import os, resource, runpy, sys

full, sys.argv = sys.argv[1], sys.argv[2:]
if os.environ["RANK"] == full:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("full", ["0", "1"])
def test_a_disk_that_is_full_is_told_in_one_line(workspace: Workspace, teacher: str, full: str) -> None:
    """Of one rank; files there stop growing in the midst of a save. With room, the run goes on."""
    script, save = workspace.path / "full.py", f"full-{full}"
    script.write_text(FULL)
    command = [*workspace.data, *TRAIN, "--train-iters", "1", "--eval-iters", "0", "--pretrained-checkpoint", teacher]
    program = [ROOT / "pretrain_hybrid.py", *command, "--load", save, "--save", save]
    done = fork_server.run([script, full, *program], 2, workspace.path)
    assert done.returncode == 2
    assert f"error: the checkpoint cannot be saved: a rank cannot write its part\n  got:   {save}/iter_" in done.stderr
    assert f"rank {full}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert fork_server.run(program, 2, workspace.path).returncode == 0
    assert [step["step"] for step in workspace.metrics(save)] == [1]


def test_a_corrected_teacher_may_be_cut_off_again_before_the_students_first_save(
    workspace: Workspace, teacher: str
) -> None:
    """The teacher is saved before the student, so a second start writes the same step of it anew, and may die there."""
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "1", "--eval-iters", "0", "--distill-teacher", teacher]
    command = [*flags, "--distill-correct-teacher", "together", "--load", "cut-off", "--save", "cut-off"]
    workspace.run("distill_gpt.py", *command)
    first = workspace.metrics("cut-off")[0]
    run = workspace.path / "cut-off"
    (run / layout.TRACKER).unlink()
    for folder in (run, run / "teacher"):
        (folder / "iter_0000001" / "metadata.json").unlink()
    assert (run / "teacher" / layout.TRACKER).read_text() == "1"
    workspace.run("distill_gpt.py", *command)
    (again,) = workspace.metrics("cut-off")
    assert (again["loss"], again["teacher_loss"]) == (first["loss"], first["teacher_loss"])
    assert layout.find(run / "teacher").iteration == layout.find(run).iteration == 1


@pytest.mark.parametrize("given", [["--load", "fresh"], ["--load", "new", "--pretrained-checkpoint", "nowhere"]])
def test_what_is_not_there_is_named_with_its_flag(workspace: Workspace, given: list[str]) -> None:
    done = workspace.run(
        "pretrain_hybrid.py", *workspace.data, *TRAIN, *given, "--train-iters", "1", "--save", "new", ok=False
    )
    assert f"error: {given[-2]}: the checkpoint directory does not exist" in done.stderr
    assert not (workspace.path / "new").exists()


def test_a_run_goes_on_longer_than_it_was_to(workspace: Workspace, teacher: str) -> None:
    flags = [*MODEL, *workspace.data, *TRAIN, "--load", "longer", "--save", "longer"]
    workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "2")
    shutil.copytree(workspace.path / "longer", workspace.path / "half-precision")
    done = workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "4")
    assert "train_iters 4 (was 2)" in done.stderr
    losses = [[step["loss"] for step in workspace.metrics(name)] for name in ("longer", teacher)]
    assert losses[0] == losses[1]
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--load", "half-precision"]
    done = workspace.run("pretrain_hybrid.py", *flags, "--save", "half-precision", "--bf16", ok=False)
    assert "error: the optimizer state cannot move to another precision" in done.stderr
    assert "legal: neither --bf16 nor --fp16" in done.stderr


@pytest.mark.parametrize("optimizer", ["--clip-grad=1.0", "--use-distributed-optimizer"])
def test_a_run_goes_on_with_another_learning_rate(workspace: Workspace, optimizer: str) -> None:
    """What the command line says counts: learning rate and its course, and what else the optimizer is told."""
    name = "rate" + optimizer[:5]
    flags = [*MODEL, *workspace.data, *TRAIN, optimizer, "--load", name, "--save", name]
    workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "2")
    kept = shutil.copytree(workspace.path / name, workspace.path / f"{name}-kept").name
    other = ["--train-iters", "4", "--lr", "1e-4", "--min-lr", "2e-5", "--lr-decay-style", "cosine"]
    done = workspace.run("pretrain_hybrid.py", *flags, *other, "--adam-beta2", "0.9")
    assert "lr 0.0001 (was 0.002)" in done.stderr
    assert "adam_beta2 0.9 (was 0.999)" in done.stderr
    rates = [step["learning_rate"] for step in workspace.metrics(name)]
    course = [2e-5 + 0.5 * 8e-5 * (1 + math.cos(math.pi * done)) for done in (3 / 4, 1)]
    assert rates == pytest.approx([2e-3, 2e-3, *course])
    saved = layout.common(workspace.path / name / "iter_0000004")
    groups = saved["optimizer"].get("param_groups", [])  # the distributed one has them elsewhere
    assert bool(groups) == ("distributed" not in optimizer)
    assert all(tuple(group["betas"]) == (0.9, 0.9) for group in groups)
    assert [group["max_lr"] for group in groups] == [1e-4] * len(groups)
    again = [*flags[:-4], "--load", kept, "--save", kept, *other, "--use-checkpoint-opt_param-scheduler"]
    workspace.run("pretrain_hybrid.py", *again)
    assert [step["learning_rate"] for step in workspace.metrics(kept)] == pytest.approx([2e-3] * 4)


def test_fp16_goes_on_before_its_first_step_is_taken(workspace: Workspace) -> None:
    """All steps so far were skipped for their loss scale, so the optimizer has no moments yet."""
    flags = [*MODEL, *workspace.data, *TRAIN, "--fp16", "--train-iters", "3"]
    workspace.run("pretrain_hybrid.py", *flags, "--save", "skipping")
    parts = [*flags, "--load", "skipping-parts", "--save", "skipping-parts"]
    workspace.run("pretrain_hybrid.py", *parts, "--exit-interval", "2")
    workspace.run("pretrain_hybrid.py", *parts)
    straight, resumed = workspace.metrics("skipping"), workspace.metrics("skipping-parts")
    assert [step["loss_scale"] for step in resumed] == [2**32, 2**31, 2**30]
    assert [step["loss"] for step in resumed] == [step["loss"] for step in straight]


def test_going_back_is_branching_off(workspace: Workspace, teacher: str) -> None:
    flags = [*workspace.data, *TRAIN, "--train-iters", "3", "--load", teacher]
    for given, message in (
        (["--save", teacher, "--ckpt-step", "2"], "--ckpt-step goes back in the run's own directory"),
        (["--save", "branched off", "--ckpt-step", "3"], "--load: --ckpt-step 3: no such step"),
        (["--save", teacher, "--finetune"], "--finetune begins at step 1 in the run's own directory"),
    ):
        done = workspace.run("pretrain_hybrid.py", *flags, *given, ok=False)
        assert f"error: {message}" in done.stderr
    workspace.run("pretrain_hybrid.py", *flags, "--save", "branched off", "--ckpt-step", "2")
    straight = workspace.metrics(teacher)[2]
    (step,) = workspace.metrics("branched off")
    assert (step["step"], step["loss"], step["tokens"]) == (3, straight["loss"], straight["tokens"])


def test_nothing_is_trained_into_a_directory_in_which_another_job_works(workspace: Workspace, teacher: str) -> None:
    flags = [*workspace.data, *TRAIN, "--pretrained-checkpoint", teacher, "--train-iters", "1", "--eval-iters", "0"]
    code = "import sys; from pathlib import Path; from megatron_ext.checkpoint import outputs"
    code += "; outputs.hold_run(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, workspace.path / "busy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = workspace.run("pretrain_hybrid.py", *flags, "--save", "busy", ok=False)
        assert "error: another job writes there" in done.stderr
        assert [path.name for path in (workspace.path / "busy").iterdir()] == [".lock"]
        other.kill()
    workspace.run("pretrain_hybrid.py", *flags, "--save", "busy", ranks=2)
    assert len(workspace.metrics("busy")) == 1
    assert not (workspace.path / "busy" / ".lock").exists()
    done = workspace.run("pretrain_hybrid.py", *flags)
    assert "no --save: what is trained will be gone at the end" in done.stderr


def test_what_cannot_be_written_is_found_before_the_work(
    workspace: Workspace, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, nowhere = str(workspace.path / teacher), "/proc/nowhere"
    for words in (
        ["generate", model, "--prompt", "x", "--output", f"{nowhere}/x.jsonl"],
        ["evaluate", model, "--speed", "8", "--save", nowhere],
        ["convert", model, nowhere, "--from", "megatron", "--to", "hf"],
        ["compare", model, "--out", nowhere],
        ["data", "--out", nowhere],
    ):
        assert cli.main(words) == 2, words
        out, err = capsys.readouterr()
        assert "nothing can be written there" in err
        assert out == ""
    prune = [*workspace.data, "--load", teacher, "--prune-ffn-hidden-size", "48", "--prune-samples", "8"]
    for save, message in ((teacher, "exists already"), (nowhere, "nothing can be written there")):
        done = workspace.run("prune_gpt.py", *prune, "--save", save, ok=False)
        assert message in done.stderr
        assert "scored" not in done.stdout
    cache = ["--distill-teacher", teacher, "--distill-cache-write", nowhere]
    done = workspace.run("distill_gpt.py", *workspace.data, *cache, ok=False)
    assert "--distill-cache-write: nothing can be written there" in done.stderr
    (workspace.path / "sealed").mkdir()
    for ending in ("bin", "idx"):
        shutil.copy(workspace.path / "data" / f"text_document.{ending}", workspace.path / "sealed")
    (workspace.path / "sealed" / "text_document").touch()  # where the caches would be
    sealed = ["sealed/text_document" if word == "data/text_document" else word for word in workspace.data]
    flags = [*sealed, *TRAIN, "--pretrained-checkpoint", teacher, "--train-iters", "1", "--eval-iters", "0"]
    done = workspace.run("pretrain_hybrid.py", *flags, ok=False)
    assert "error: the caches of the data's indices cannot be written: Not a directory" in done.stderr
    assert "--data-cache-path" in done.stderr
