"""Pre-training: the layout does not matter, resuming is exact, and nothing restarts from random weights."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext.checkpoint import checksums
from megatron_ext.checkpoint.layout import read_metadata
from megatron_ext.checkpoint.reader import CheckpointReader

GOLDEN = Path(__file__).parent / "golden_losses.txt"
SMALLER = ["--micro-batch-size", "2"]  # so that ranks add up gradients, and chunks of stages are interleaved
LAYOUTS = {
    "dp2-distributed-optimizer": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", *SMALLER]),
    "tp2-sequence-parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2", *SMALLER]),
    "vpp2": (2, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "M|-*|-M|-", *SMALLER]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "recompute": (
        1,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]),
}


@pytest.fixture(scope="module")
def reference(workspace: Workspace, teacher: str) -> list[dict[str, float]]:
    """Two more steps from the teacher's weights on one process."""
    flags = [*workspace.data, *TRAIN, "--train-iters", "2"]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", teacher, *flags, "--save", "reference")
    return workspace.metrics("reference")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_loss(
    workspace: Workspace, teacher: str, reference: list[dict[str, float]], layout: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    common = [*workspace.data, *TRAIN, "--train-iters", "2", "--pretrained-checkpoint", teacher, "--save", layout]
    if "--hybrid-layer-pattern" in flags:
        common += ["--preset", teacher]
    run = workspace.start if layout == "tp2-sequence-parallel" else workspace.run  # one with torchrun itself
    run("pretrain_hybrid.py", *common, *flags, ranks=ranks)
    metrics = workspace.metrics(layout)
    assert [step["step"] for step in metrics] == [1, 2]
    for step, expected in zip(metrics, reference, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert metrics[-1]["val_loss"] == pytest.approx(reference[-1]["val_loss"], rel=1e-6)


def test_the_distributed_optimizer_goes_on_on_another_layout(workspace: Workspace, teacher: str) -> None:
    """With its moments: two steps more are those on the layout that it was saved on."""
    common = [*workspace.data, *TRAIN, "--eval-iters", "0", "--save-interval", "9"]
    distributed = [*common, "--use-distributed-optimizer"]
    first = ["--pretrained-checkpoint", teacher, "--train-iters", "4", "--exit-interval", "2", "--save", "moved"]
    workspace.run("pretrain_hybrid.py", *first, *distributed, ranks=2)
    shutil.copytree(workspace.path / "moved", workspace.path / "stayed")
    go_on = {name: ["--load", name, "--save", name, "--train-iters", "4"] for name in ("moved", "stayed")}
    done = workspace.run("pretrain_hybrid.py", *go_on["moved"], *common, ok=False)
    assert done.returncode == 2
    assert "saved with --use-distributed-optimizer" in done.stderr
    workspace.run("pretrain_hybrid.py", *go_on["stayed"], *distributed, ranks=2)
    workspace.run("pretrain_hybrid.py", *go_on["moved"], *distributed, "--tensor-model-parallel-size", "2", ranks=2)
    moved, stayed = (workspace.metrics(name) for name in ("moved", "stayed"))
    assert [step["step"] for step in moved] == [1, 2, 3, 4]
    for step, expected in zip(moved, stayed, strict=True):
        assert [step["loss"], step["grad_norm"]] == pytest.approx([expected["loss"], expected["grad_norm"]], rel=1e-5)


def test_masked_tokens_change_no_gradient_with_the_micro_batch(workspace: Workspace, teacher: str) -> None:
    """The tokens that are masked, here the likeliest, are unevenly spread: a mean of means is not the mean."""
    tokens = np.fromfile(workspace.path / "data/text_document.bin", dtype=np.uint16)
    masked = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "511", "--eod-mask-loss"]
    masked += ["--null-tokenizer-eod-id", str(np.bincount(tokens).argmax())]
    flags = [*workspace.data, *TRAIN, *masked, "--train-iters", "1", "--eval-iters", "0"]
    jobs = {
        "pretrain_hybrid.py": ["--pretrained-checkpoint", teacher],
        "distill_gpt.py": [*MODEL, "--distill-teacher", teacher, "--distill-ce-weight", "0.5"],
    }
    layouts = [(1, "4", []), (2, "1", []), (2, "2", ["--context-parallel-size", "2"])]
    for script, own in jobs.items():
        found = []
        for ranks, micro, layout in layouts[: 3 if script == "pretrain_hybrid.py" else 2]:
            save = f"masked-{script}-{micro}"
            workspace.run(script, *own, *flags, "--micro-batch-size", micro, *layout, "--save", save, ranks=ranks)
            found.append([workspace.metrics(save)[0][name] for name in ("loss", "grad_norm")])
        assert found[1:] == [pytest.approx(found[0], rel=1e-6)] * (len(found) - 1), script


def test_resume_is_bit_exact(workspace: Workspace, teacher: str) -> None:
    flags = [*MODEL, *workspace.data, *TRAIN, "--save", "half", "--load", "half", "--lr-decay-iters", "4"]
    workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "4", "--exit-interval", "2")
    assert [step["step"] for step in workspace.metrics("half")] == [1, 2]
    workspace.run("pretrain_hybrid.py", *flags, "--train-iters", "4")
    keys = ("step", "loss", "grad_norm", "tokens")
    resumed, straight = (
        [[step[key] for key in keys] for step in workspace.metrics(name)] for name in ("half", teacher)
    )
    assert resumed == straight
    assert (workspace.path / "half" / "metrics.png").is_file()
    left, right = (CheckpointReader(workspace.path / name) for name in ("half", teacher))
    assert left.shapes.keys() == right.shapes.keys()
    for key in left.shapes:
        assert torch.equal(left.read(key), right.read(key)), key


def test_resume_with_dropout_is_bit_exact(workspace: Workspace, teacher: str) -> None:
    """Going on draws nothing from the generator that the masks come from."""
    flags = [*workspace.data, *TRAIN, "--eval-iters", "0", "--hidden-dropout", "0.2", "--attention-dropout", "0.2"]
    flags += ["--train-iters", "3", "--save-interval", "2"]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", teacher, *flags, "--save", "dropped")
    straight = workspace.metrics("dropped")
    shutil.rmtree(workspace.path / "dropped/iter_0000003")
    (workspace.path / "dropped/latest_checkpointed_iteration.txt").write_text("2")
    workspace.run("pretrain_hybrid.py", *flags, "--load", "dropped", "--save", "dropped")
    resumed = workspace.metrics("dropped")
    assert [step["step"] for step in resumed] == [1, 2, 3]
    assert [(step["loss"], step["grad_norm"]) for step in resumed] == [
        (step["loss"], step["grad_norm"]) for step in straight
    ]


def test_a_damaged_last_step_falls_back_to_the_one_before(workspace: Workspace, teacher: str) -> None:
    run = workspace.path / "damaged"
    shutil.copytree(workspace.path / teacher, run)
    data = max((run / "iter_0000004").glob("*.distcp"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    (run / "latest_checkpointed_iteration.txt").write_text("")
    flags = [*workspace.data, *TRAIN, "--train-iters", "4", "--load", "damaged", "--save", "damaged"]
    done = workspace.run("pretrain_hybrid.py", *flags)
    assert "iter_0000002" in done.stderr
    for ours, straight in zip(workspace.metrics("damaged"), workspace.metrics(teacher), strict=True):
        assert ours["loss"] == straight["loss"]


def test_a_flipped_bit_is_named(workspace: Workspace, teacher: str) -> None:
    """Of the optimizer when the training goes on; of a weight whoever loads it."""
    step = workspace.path / "flipped" / "iter_0000004"
    shutil.copytree(workspace.path / teacher, step.parent)
    places = read_metadata(step).storage_data
    for kind in ("optimizer", "decoder.layers"):
        info = max((info for index, info in places.items() if index.fqn.startswith(kind)), key=lambda info: info.length)
        file = step / info.relative_path
        content = bytearray(file.read_bytes())
        content[info.offset + info.length // 2] ^= 4
        file.write_bytes(content)
        flags = [*workspace.data, *TRAIN, "--train-iters", "6", "--load", "flipped", "--save", "flipped"]
        done = workspace.run("pretrain_hybrid.py", *flags, ok=False)
        assert done.returncode == 2
        assert f"the checkpoint is damaged: {info.relative_path} is not what was written" in done.stderr
        assert "Traceback" not in done.stderr
        loads = ["--pretrained-checkpoint", "flipped", "--skip-train", *workspace.data]
        done = workspace.run("pretrain_hybrid.py", *loads, ok=kind == "optimizer")
    assert "is not what was written" in done.stderr


def test_every_rank_notes_what_it_wrote(workspace: Workspace, teacher: str) -> None:
    save = "noted"
    train = [*workspace.data, *TRAIN, "--train-iters", "1", "--pretrained-checkpoint", teacher, "--save", save]
    workspace.run("pretrain_hybrid.py", *train, "--use-distributed-optimizer", ranks=2)
    step = workspace.path / save / "iter_0000001"
    assert checksums.verify_step(step)
    sums = checksums.Checksums.read(step)
    assert sums is not None
    assert sums.files.keys() == {file.name for file in step.iterdir()} - {checksums.FILE}
    assert {name[:5] for name in sums.files if name.endswith(".distcp")} == {"__0_0", "__1_0"}


def test_nothing_left_to_resume_is_an_error(workspace: Workspace, teacher: str) -> None:
    run = workspace.path / "hopeless"
    shutil.copytree(workspace.path / teacher, run)
    for index in run.glob("iter_*/.metadata"):
        index.unlink()
    flags = [*MODEL, *workspace.data, *TRAIN, "--train-iters", "4", "--load", "hopeless", "--save", "hopeless"]
    done = workspace.run("pretrain_hybrid.py", *flags, ok=False)
    assert "no complete checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


class Bomb:
    """Makes a directory, wherever it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hit",)


def index_with_a_bomb(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Bomb()))


def random_state_with_a_bomb(step: Path) -> None:
    index = read_metadata(step)
    key = next(key for key in index.storage_data if "rng_state" in key.fqn)
    torch.save(Bomb(), step / "bomb.distcp")
    index.storage_data[key] = _StorageInfo("bomb.distcp", 0, (step / "bomb.distcp").stat().st_size)
    (step / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("arm", [index_with_a_bomb, random_state_with_a_bomb])
def test_what_megatron_loads_runs_nothing(workspace: Workspace, teacher: str, tmp_path: Path, arm: Any) -> None:
    shutil.copytree(workspace.path / teacher, tmp_path / "theirs")
    step = tmp_path / "theirs" / "iter_0000002"  # not the step that is looked at, but the one that is asked for
    arm(step)
    (step / checksums.FILE).unlink()  # or it would end there
    flags = ["--load", str(tmp_path / "theirs"), "--ckpt-step", "2", "--save", str(tmp_path / "run")]
    done = workspace.run("pretrain_hybrid.py", *workspace.data, *TRAIN, "--train-iters", "6", *flags, ok=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "the file asks for posix.mkdir" in done.stderr
    assert not (workspace.path / "hit").exists()


def test_losses_are_the_golden_ones(workspace: Workspace) -> None:
    """On generated data, because the corpus changes with Python's patch releases."""
    flags = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511", "--padded-vocab-size", "512"]
    flags += ["--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "4"]
    workspace.start("pretrain_hybrid.py", *MODEL, *flags, *TRAIN, "--save", "golden")
    golden = [float(line) for line in GOLDEN.read_text().split()]
    assert [step["loss"] for step in workspace.metrics("golden")] == pytest.approx(golden, rel=1e-4)


LATE = """
import os, runpy, sys, time
if os.environ["RANK"] == "0":
    time.sleep(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_first_rank_may_come_last(workspace: Workspace, teacher: str) -> None:
    """Nobody writes into the run directory before everybody has looked whether it is free."""
    (workspace.path / "late.py").write_text(LATE)
    flags = [*workspace.data, *TRAIN, "--train-iters", "1", "--eval-iters", "0", "--save", "late"]
    command = [workspace.path / "late.py", ROOT / "pretrain_hybrid.py", "--pretrained-checkpoint", teacher, *flags]
    done = fork_server.run(command, 2, workspace.path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(workspace.metrics("late")) == 1
