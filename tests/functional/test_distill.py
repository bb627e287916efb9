"""Distillation: any layout trains the same, only the student is saved, and bad requests end at once."""

import pytest
import yaml
from workspace import TRAIN, Workspace

from megatron_ext.checkpoint import layout

STUDENT = [
    "--hybrid-layer-pattern=M-*-", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4",
    "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "8", "--mamba-num-heads", "4",
    "--mamba-head-dim", "8", "--mamba-state-dim", "8", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope", "--max-position-embeddings", "64",
]  # fmt: skip
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "vpp2": (2, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M|-|*|-"]),
    "dp2": (2, ["--use-distributed-optimizer"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
TP, PP = "--distill-teacher-tensor-model-parallel-size", "--distill-teacher-pipeline-model-parallel-size"
ELSEWHERE = {
    "tp2 for dp2": (2, [TP, "2"]),
    "dp2 for tp2": (2, [TP, "1", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2 for cp2": (2, [PP, "2", "--context-parallel-size", "2"]),
    "tp2-pp2 for vpp2-dp2": (
        4,
        [TP, "2", PP, "2", "--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M|-|*|-"],
    ),
}
TWO_STEPS = [*TRAIN, "--train-iters", "2"]
# Wherever the teacher's states come to be before the student's, or after them, and on every stage.
STATES = ["--distill-states", "embedding", "final", "0:3", "2:0", "norm3:norm5", "*", "--distill-states-loss", "mse"]


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
    run = workspace.start if name == "cp2" else workspace.run  # one with torchrun itself
    run("distill_gpt.py", *flags, *workspace.data, *TWO_STEPS, "--save", f"distilled {name}", ranks=ranks)
    expect_the_same(workspace.metrics(f"distilled {name}"), workspace.metrics(distilled))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_teachers_own_layout_changes_nothing(
    workspace: Workspace, teacher: str, student: str, distilled: str, name: str
) -> None:
    ranks, flags = ELSEWHERE[name]
    flags = [*STUDENT, "--pretrained-checkpoint", student, "--distill-teacher", teacher, *STATES, *flags]
    workspace.run("distill_gpt.py", *flags, *workspace.data, *TWO_STEPS, "--save", f"distilled {name}", ranks=ranks)
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


def test_resumes_exactly(workspace: Workspace, teacher: str, student: str) -> None:
    flags = [
        "--distill-teacher", teacher, "--pretrained-checkpoint", student, *workspace.data, *TRAIN,
        "--distill-ce-weight", "0.5:0.1", "--distill-temperature", "2", "--distill-loss", "top-k-rest",
    ]  # fmt: skip
    workspace.run("distill_gpt.py", *flags, "--train-iters", "4", "--save", "straight")
    workspace.run("distill_gpt.py", *flags, "--train-iters", "4", "--exit-interval", "2", "--save", "halves")
    workspace.run("distill_gpt.py", *flags, "--train-iters", "4", "--load", "halves", "--save", "halves")
    straight, halves = workspace.metrics("straight"), workspace.metrics("halves")
    assert len(halves) == 4
    for key in ("loss", "kd_loss", "total_loss", "grad_norm"):
        assert [step[key] for step in halves] == [step[key] for step in straight]


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--distill-teacher is missing"),
        (["--distill-teacher", "nowhere"], "does not exist"),
        (["--distill-teacher", "teacher", "--distill-temperature", "0"], "must be positive"),
        (["--distill-teacher", "teacher", "--distill-kd-weight", "0"], "nor both zero"),
        (["--distill-teacher", "teacher", "--distill-ce-weight", "1:half"], "FIRST:LAST"),
        (["--distill-teacher", "teacher", "--distill-loss", "kl"], "unknown divergence"),
        (["--distill-teacher", "teacher", "--distill-loss", "top-k", "--distill-top-k", "600"], "1 to 512"),
        (["--distill-teacher", "teacher", "--padded-vocab-size", "1024"], "different vocabularies"),
    ],
)
def test_bad_requests_end_at_once(workspace: Workspace, teacher: str, flags: list[str], message: str) -> None:
    save = workspace.path / "refused"
    done = workspace.run("distill_gpt.py", *STUDENT, *workspace.data, *TWO_STEPS, *flags, "--save", "refused", ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not save.exists()
