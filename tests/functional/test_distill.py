"""Distillation: any layout trains the same, only the student is saved, and bad requests end at once."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import fork_server
import pytest
import yaml
from workspace import ROOT, TRAIN, Workspace

from megatron_ext.checkpoint import layout
from tests.distributed.test_meeting_place import two_free_ports

STUDENT = [
    "--hybrid-layer-pattern=M-*-", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4",
    "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "8", "--mamba-num-heads", "4",
    "--mamba-head-dim", "8", "--mamba-state-dim", "8", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope", "--max-position-embeddings", "64",
]  # fmt: skip
SMALLER = ["--micro-batch-size", "2"]  # so that ranks add up gradients, and chunks of stages are interleaved
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2", *SMALLER]),
    "vpp2": (2, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M|-|*|-", *SMALLER]),
    "dp2": (2, ["--use-distributed-optimizer", *SMALLER]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
TP, PP = "--distill-teacher-tensor-model-parallel-size", "--distill-teacher-pipeline-model-parallel-size"
ELSEWHERE = {
    "tp2 for dp2": (2, [TP, "2"]),
    "dp2 for tp2": (2, [TP, "1", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "tp2 on two ranks for dp2 on two more": (4, ["--distill-teacher-ranks", "2", TP, "2"]),
    "pp2 for cp2": (2, [PP, "2", "--context-parallel-size", "2"]),
    "tp2-pp2 for vpp2-dp2": (
        4,
        [TP, "2", PP, "2", "--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M|-|*|-", *SMALLER],
    ),
}
TWO_STEPS = [*TRAIN, "--train-iters", "2"]
# Wherever the teacher's states come to be before the student's, or after them, and on every stage.
STATES = ["--distill-states", "embedding", "final", "0:3", "2:0", "norm3:norm5", "*", "--distill-states-loss", "mse"]


SWAPPED = ["--tokenizer-model", "swapped", "--data-path", "bare/text_document"]


@pytest.fixture(scope="module")
def swapped(workspace: Workspace) -> None:
    """A tokenizer as large as the workspace's but for two tokens that changed numbers, and data of unknown origin."""
    (workspace.path / "bare").mkdir()
    for ending in ("bin", "idx"):
        shutil.copy(workspace.path / f"data/text_document.{ending}", workspace.path / "bare")
    shutil.copytree(workspace.path / "data" / "tokenizer", workspace.path / "swapped")
    file = workspace.path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def student(workspace: Workspace) -> str:
    """A narrower and shallower model after two steps."""
    workspace.run("pretrain_hybrid.py", *STUDENT, *workspace.data, *TWO_STEPS, "--save", "student")
    return "student"


@pytest.fixture(scope="module")
def distilled(workspace: Workspace, teacher: str, student: str) -> str:
    """The student after two steps with the teacher, on one process."""
    flags = ["--distill-teacher", teacher, "--pretrained-checkpoint", student, "--save", "distilled", *STATES]
    workspace.run("distill_gpt.py", *flags, *workspace.data, *TWO_STEPS)
    return "distilled"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_nothing(
    workspace: Workspace, teacher: str, student: str, distilled: str, name: str
) -> None:
    ranks, flags = LAYOUTS[name]
    flags = [*STUDENT, "--pretrained-checkpoint", student, "--distill-teacher", teacher, *STATES, *flags]
    workspace.run("distill_gpt.py", *workspace.data, *flags, *TWO_STEPS, "--save", f"distilled {name}", ranks=ranks)
    expect_the_same(workspace.metrics(f"distilled {name}"), workspace.metrics(distilled))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_teachers_own_layout_changes_nothing(
    workspace: Workspace, teacher: str, student: str, distilled: str, name: str
) -> None:
    ranks, flags = ELSEWHERE[name]
    flags = [*STUDENT, "--pretrained-checkpoint", student, "--distill-teacher", teacher, *STATES, *flags]
    workspace.run("distill_gpt.py", *workspace.data, *flags, *TWO_STEPS, "--save", f"distilled {name}", ranks=ranks)
    expect_the_same(workspace.metrics(f"distilled {name}"), workspace.metrics(distilled))


def expect_the_same(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(got) == 2
    states = [key for key in expected[0] if key.startswith("states_")]
    assert len(states) == 8
    for key in ("loss", "kd_loss", "grad_norm", "total_loss", *states):
        assert [step[key] for step in got] == pytest.approx([step[key] for step in expected], rel=1e-5), key
    assert got[0]["states_weight"] == 0 < got[1]["states_weight"]
    for key in ("val_loss", "val_kd_loss", "val_states_loss"):
        assert got[-1][key] == pytest.approx(expected[-1][key], rel=1e-5)


def test_the_checkpoint_is_the_students(workspace: Workspace, student: str, distilled: str) -> None:
    steps = [layout.find(workspace.path / name).path for name in (student, distilled)]
    names = [set(layout.read_metadata(step).state_dict_metadata) for step in steps]
    assert names[0] == names[1]
    assert layout.tensors(steps[0]) == layout.tensors(steps[1])
    assert yaml.safe_load((workspace.path / distilled / "config.yaml").read_text())["job"] == "distill"
    assert workspace.loss(distilled, "distilled-alone") < 6.24  # log(512): the validation set as a whole


@pytest.fixture(scope="module")
def corrected(workspace: Workspace, teacher: str, student: str) -> str:
    """Four steps with everything that a run may have to remember: a teacher, projections and weights that change."""
    flags = [*corrects(teacher, student), *workspace.data, "--train-iters", "4", "--save", "corrected"]
    workspace.run("distill_gpt.py", *flags)
    return "corrected"


def corrects(teacher: str, student: str) -> list[str]:
    return [
        "--distill-teacher", teacher, "--pretrained-checkpoint", student, *TRAIN, *STATES,
        "--distill-ce-weight", "0.5:0.1", "--distill-temperature", "2", "--distill-loss", "top-k-rest",
        "--distill-correct-teacher", "together",
    ]  # fmt: skip


def test_resumes_exactly(workspace: Workspace, teacher: str, student: str, corrected: str) -> None:
    flags = [*corrects(teacher, student), "--train-iters", "4", "--save", "interrupted"]
    workspace.run("distill_gpt.py", *flags, *workspace.data, "--exit-interval", "2")
    # As a kill leaves it: Megatron, which writes the file in place, would end here with status 0.
    (workspace.path / "interrupted" / "teacher" / "latest_checkpointed_iteration.txt").write_text("")
    workspace.run("distill_gpt.py", *flags, *workspace.data, "--load", "interrupted")
    straight, interrupted = workspace.metrics(corrected), workspace.metrics("interrupted")
    assert len(interrupted) == 4
    times = ("seconds", "tokens_per_second")
    for before, after in zip(straight, interrupted, strict=True):
        assert {k: v for k, v in after.items() if k not in times} == {k: v for k, v in before.items() if k not in times}
    lost = workspace.path / "interrupted" / "distillation"
    lost.rename(lost.with_name("moved"))
    done = workspace.run(
        "distill_gpt.py", *flags, *workspace.data, "--load", "interrupted", "--ckpt-step", "2", "--save", "branch",
        ok=False,
    )  # fmt: skip
    assert "what was trained beside the model is not there" in done.stderr


def test_a_run_goes_on_with_its_teacher(workspace: Workspace, teacher: str, student: str) -> None:
    """Though the teacher's directory has gained a step: then the error says how to name the one before."""
    grown, last = workspace.path / "growing", "iter_0000004"
    shutil.copytree(workspace.path / teacher, grown, ignore=shutil.ignore_patterns(last))
    (grown / layout.TRACKER).write_text("2")
    flags = ["--pretrained-checkpoint", student, *workspace.data, *TRAIN, "--load", "grows", "--save", "grows"]
    workspace.run("distill_gpt.py", *flags, "--train-iters", "2", "--distill-teacher", "growing")
    first = f"--distill-teacher {grown / 'iter_0000002'}"
    assert first in (workspace.path / "grows" / "config.yaml").read_text()
    shutil.copytree(workspace.path / teacher / last, grown / last)
    (grown / layout.TRACKER).write_text("4")
    flags += ["--train-iters", "4"]
    done = workspace.run("distill_gpt.py", *flags, "--distill-teacher", "growing", ok=False)
    assert done.returncode == 2
    assert "a run cannot go on with another teacher" in done.stderr
    assert f"legal: {first}" in done.stderr
    workspace.run("distill_gpt.py", *flags, *first.split(), "--dry-run")


def test_a_corrected_teacher_is_one_that_trains(
    workspace: Workspace, teacher: str, student: str, corrected: str
) -> None:
    """With a fifth of the learning rate, the warm-up of a short run, and no word from the student; on any layout."""
    flags = ["--pretrained-checkpoint", teacher, *TRAIN, "--lr", "4e-4", "--lr-warmup-iters", "2", "--train-iters", "4"]
    workspace.run("pretrain_hybrid.py", *flags, *workspace.data, "--save", "alone")
    alone = [step["loss"] for step in workspace.metrics("alone")]
    assert [step["teacher_loss"] for step in workspace.metrics(corrected)] == pytest.approx(alone, rel=1e-6)
    assert workspace.loss(f"{corrected}/teacher", "corrected teacher") == pytest.approx(
        workspace.loss("alone", "trained teacher"), rel=1e-6
    )
    flags = [
        *STUDENT,
        *corrects(teacher, student),
        "--train-iters",
        "4",
        "--save",
        "corrected on 4",
        "--overlap-grad-reduce",
    ]
    flags += ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--use-distributed-optimizer"]
    workspace.run("distill_gpt.py", *flags, "--pipeline-model-parallel-size", "2", *workspace.data, ranks=4)
    for key in ("loss", "kd_loss", "states_loss", "teacher_loss"):
        got, expected = ([step[key] for step in workspace.metrics(run)] for run in ("corrected on 4", corrected))
        assert got == pytest.approx(expected, rel=1e-5), key


def test_a_teacher_is_corrected_first(workspace: Workspace, teacher: str, student: str, corrected: str) -> None:
    """By other processes than those of the student, which meet twice."""
    flags = [*workspace.data, *TRAIN, "--train-iters", "1"]
    first = ["--distill-correct-teacher", "first", "--distill-correction-iters", "4", "--save", "first"]
    command = ["--pretrained-checkpoint", student, "--distill-teacher", teacher, *flags, *first]
    port = two_free_ports()
    with socket.socket() as taken:  # whoever takes the port after the one where ranks meet
        taken.bind(("0.0.0.0", port + 1))
        taken.listen()
        run = [ROOT / "distill_gpt.py", *command]
        done = fork_server.run(run, 2, workspace.path, {"MASTER_PORT": str(port)})
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [step["loss"] for step in workspace.metrics("first/teacher")]
    assert losses == pytest.approx([step["teacher_loss"] for step in workspace.metrics(corrected)], rel=1e-6)
    command = ["--pretrained-checkpoint", student, "--distill-teacher", "first/teacher", *flags]
    workspace.run("distill_gpt.py", *command, "--save", "then")
    for key in ("loss", "kd_loss"):
        assert workspace.metrics("first")[0][key] == pytest.approx(workspace.metrics("then")[0][key], rel=1e-6)


def test_signals_save_and_end_well(workspace: Workspace, teacher: str, student: str) -> None:
    """Ctrl-C, then SIGTERM to the run that goes on."""
    flags = ["--pretrained-checkpoint", student, "--distill-teacher", teacher, *workspace.data, *TRAIN, *STATES]
    command = [sys.executable, str(ROOT / "distill_gpt.py"), *flags, "--load", "stopped", "--save", "stopped"]
    command += ["--train-iters", "100000", "--save-interval", "100000", "--eval-interval", "100000"]
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        log = workspace.path / "stopped" / "metrics.jsonl"
        with subprocess.Popen(command, cwd=workspace.path, stderr=subprocess.PIPE, text=True) as run:
            while run.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > done):
                time.sleep(0.05)
            run.send_signal(number)
            assert run.wait() == 0, run.stderr.read()[-3000:]  # type: ignore[union-attr]
        steps = [step["step"] for step in workspace.metrics("stopped")]
        assert steps == list(range(1, len(steps) + 1))
        assert layout.find(workspace.path / "stopped").iteration == len(steps) > done
        done = len(steps)


def test_memory_does_not_grow(workspace: Workspace, teacher: str, student: str) -> None:
    flags = [*corrects(teacher, student), *workspace.data, "--train-iters", "121", "--save", "long"]
    flags += ["--save-interval", "1000", "--eval-interval", "1000", "--global-batch-size", "2", *SMALLER]
    done = fork_server.run([ROOT / "tests/support/memory_of_steps.py", *flags], cwd=workspace.path)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads((workspace.path / "memory.json").read_text())
    (early, tensors), (late, others) = memory["20"], memory["120"]
    assert others == tensors
    assert late - early < 4 * 2**20, memory  # the logits of 100 micro-batches of the two models would be 50 MB


def test_a_model_has_nothing_to_learn_from_itself(workspace: Workspace, teacher: str) -> None:
    flags = ["--distill-teacher", teacher, "--pretrained-checkpoint", teacher, "--save", "itself", "--train-iters", "1"]
    workspace.start("distill_gpt.py", *flags, *workspace.data, *TRAIN)
    (step,) = workspace.metrics("itself")
    assert abs(step["kd_loss"]) < 1e-6
    assert step["grad_norm"] < 1e-6


def test_cross_entropy_alone_is_pretraining(workspace: Workspace, teacher: str, student: str) -> None:
    flags = ["--pretrained-checkpoint", student, *workspace.data, *TWO_STEPS]
    workspace.run("pretrain_hybrid.py", *flags, "--save", "pretrained")
    only = ["--distill-teacher", teacher, "--distill-kd-weight", "0", "--distill-ce-weight", "1"]
    workspace.run("distill_gpt.py", *flags, *only, "--save", "cross-entropy")
    runs = [workspace.metrics(name) for name in ("pretrained", "cross-entropy")]
    assert "total_loss" not in runs[1][0]  # it would be `loss` once more
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in runs[1]] == pytest.approx([step[key] for step in runs[0]], rel=1e-6)
    assert runs[1][-1]["val_loss"] == pytest.approx(runs[0][-1]["val_loss"], rel=1e-6)


def test_padding_of_the_vocabulary_does_not_matter(workspace: Workspace, teacher: str) -> None:
    """A student with more padding runs beside the teacher, and the split puts no padding into the distributions."""
    data = [*workspace.data, "--padded-vocab-size", "528"]
    once = [*TRAIN, "--train-iters", "1"]
    workspace.run("pretrain_hybrid.py", *STUDENT, *data, *once, "--save", "padded")
    steps = []
    for ranks in (1, 2):
        save = ["--save", f"padded-{ranks}", "--tensor-model-parallel-size", str(ranks)]
        flags = ["--pretrained-checkpoint", "padded", "--distill-teacher", teacher, *save]
        workspace.run("distill_gpt.py", *flags, *data, *once, ranks=ranks)
        steps += workspace.metrics(f"padded-{ranks}")
    for key in ("loss", "kd_loss", "grad_norm"):
        assert steps[1][key] == pytest.approx(steps[0][key], rel=1e-5)


def test_a_dry_run_counts_the_teacher(workspace: Workspace, teacher: str) -> None:
    shown = []
    for flags in ([], ["--distill-correct-teacher", "together", "--save", "dry"]):
        common = ["--distill-teacher", teacher, *STUDENT, *workspace.data, *TWO_STEPS, "--dry-run"]
        shown.append(workspace.run("distill_gpt.py", *common, *flags).stdout)
    parameters = layout.architecture(layout.find(workspace.path / teacher).path).num_parameters()
    assert all(f"{parameters:,} parameters" in text and "distillation" in text for text in shown)
    assert "corrected while it teaches" in shown[1]
    assert not (workspace.path / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--distill-teacher is missing"),
        (["--distill-teacher", "nowhere"], "does not exist"),
        (["--distill-teacher", "teacher", "--distill-temperature", "0"], "must be positive"),
        (["--distill-teacher", "teacher", "--distill-kd-weight", "0"], "nor both zero"),
        (["--distill-teacher", "teacher", "--distill-ce-weight", "1:half"], "FIRST:LAST"),
        (["--distill-teacher", "teacher", "--distill-loss", "kl"], "--distill-loss: no such value"),
        (["--distill-teacher", "teacher", "--distill-loss", "top-k", "--distill-top-k", "600"], "1 to 512"),
        (["--distill-teacher", "teacher", "--vocab-size", "600"], "--vocab-size is not the tokenizer's"),
        (["--distill-teacher", "teacher", *SWAPPED], "the teacher has another tokenizer"),
        (["--distill-teacher", "teacher", *SWAPPED[:2]], "the data were made with another tokenizer"),
        (
            ["--distill-teacher", "teacher", "--pretrained-checkpoint", "teacher", *SWAPPED],
            "the checkpoint has another tokenizer",
        ),
        (
            ["--distill-teacher", "teacher", "--seq-length", "128", "--max-position-embeddings", "128"],
            "the teacher's rotary positions do not reach",
        ),
    ],
)
@pytest.mark.usefixtures("swapped")
def test_bad_requests_end_at_once(workspace: Workspace, teacher: str, flags: list[str], message: str) -> None:
    save = workspace.path / "refused"
    done = workspace.run("distill_gpt.py", *STUDENT, *workspace.data, *TWO_STEPS, *flags, "--save", "refused", ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not save.exists()
