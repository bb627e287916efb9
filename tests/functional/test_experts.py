"""A mixture of experts from training to training: any layout trains, measures and cuts the same."""

import pytest
import torch
from safetensors.torch import load_file
from workspace import MODEL, TRAIN, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.models import axes
from megatron_ext.pruning.plan import Plan
from tests.functional.test_distill import STUDENT

EXPERTS = [
    "--hybrid-layer-pattern=M-*E", *MODEL[1:], "--num-experts", "6", "--moe-ffn-hidden-size", "32",
    "--moe-shared-expert-intermediate-size", "32", "--moe-router-score-function", "sigmoid",
    "--moe-router-enable-expert-bias",
]  # fmt: skip
BALANCED = ["--moe-aux-loss-coeff", "0.01"]
EP2 = ["--expert-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
SMALLER = [
    "--prune-num-experts", "4", "--prune-moe-ffn-hidden-size", "24", "--prune-hidden-size", "48",
    "--prune-moe-shared-expert-intermediate-size", "16", "--prune-samples", "16",
]  # fmt: skip
LAYOUTS = {
    "one": (1, []),
    "ep2": (2, [*EP2, "--moe-token-dispatcher-type", "alltoall"]),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "tp2-ep2": (
        2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", *EP2, "--expert-tensor-parallel-size", "1"],
    ),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(workspace: Workspace) -> str:
    """A mixture of experts after two steps on two ranks, each with half of the experts."""
    flags = [*EXPERTS, *workspace.data, *TRAIN, *BALANCED, "--train-iters", "2", *EP2]
    workspace.run("pretrain_hybrid.py", *flags, "--save", "mixture", ranks=2)
    return "mixture"


@pytest.fixture(scope="module")
def pruned(workspace: Workspace, mixture: str) -> str:
    """The mixture cut on one process."""
    workspace.run("prune_gpt.py", "--load", mixture, "--save", "fewer", *workspace.data, *SMALLER)
    return "fewer"


def test_the_checkpoint_is_the_table(workspace: Workspace, mixture: str) -> None:
    reader = CheckpointReader(workspace.path / mixture)
    assert reader.shapes == axes.tensors(layout.architecture(reader.step.path))


@pytest.fixture(scope="module")
def trained(workspace: Workspace, mixture: str) -> str:
    """The mixture trained on, on one process."""
    return train_on(workspace, mixture, "one")


def train_on(workspace: Workspace, mixture: str, name: str) -> str:
    ranks, flags = LAYOUTS[name]
    # Adam would move a weight whose gradient is next to nothing, and all rounding, as far as any other.
    flags = [*flags, "--optimizer", "sgd", "--lr", "0.1", "--min-lr", "0.1"]
    flags += ["--train-iters", "2", "--eval-iters", "0", "--save", f"trained-{name}"]
    workspace.run(
        "pretrain_hybrid.py", "--pretrained-checkpoint", mixture, *workspace.data, *TRAIN, *BALANCED, *flags,
        ranks=ranks,
    )  # fmt: skip
    return f"trained-{name}"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_any_layout_trains_the_same(workspace: Workspace, mixture: str, trained: str, name: str) -> None:
    other = train_on(workspace, mixture, name)
    for step, expected in zip(workspace.metrics(other), workspace.metrics(trained), strict=True):
        for value in ("loss", "grad_norm", "load_balancing_loss"):
            assert step[value] == pytest.approx(expected[value], rel=1e-5)
    left, right = CheckpointReader(workspace.path / other), CheckpointReader(workspace.path / trained)
    assert left.shapes == right.shapes
    for key in left.shapes:
        torch.testing.assert_close(left.read(key), right.read(key), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout_flags", [EP2, CP2], ids=["ep2", "cp2"])
def test_parallelism_changes_no_score_and_no_plan(
    workspace: Workspace, mixture: str, pruned: str, layout_flags: list[str], request: pytest.FixtureRequest
) -> None:
    save = f"fewer-{request.node.callspec.id}"
    flags = ["--load", mixture, "--save", save, *workspace.data, *SMALLER, *layout_flags]
    workspace.run("prune_gpt.py", *flags, ranks=2)
    expected = load_file(workspace.path / pruned / "scores.safetensors")
    scores = load_file(workspace.path / save / "scores.safetensors")
    assert scores.keys() == expected.keys()
    assert expected["layers.3.expert"].shape == (6,)
    for key, value in expected.items():
        torch.testing.assert_close(scores[key], value, rtol=1e-4, atol=0)
    plans = [Plan.load(workspace.path / run / "plan.json") for run in (pruned, save)]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert (plans[0].target.num_experts, plans[0].target.moe_ffn_hidden_size) == (4, 24)


def test_a_pruned_mixture_trains_on(workspace: Workspace, pruned: str) -> None:
    flags = ["--lr", "1e-3", "--train-iters", "2", "--eval-iters", "0", "--save-interval", "2", "--save", "fewer-on"]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", pruned, *workspace.data, *flags, *EP2, ranks=2)
    assert len(workspace.metrics("fewer-on")) == 2
    reader = CheckpointReader(workspace.path / "fewer-on")
    assert reader.shapes["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"] == (4, 48, 48)


def test_a_mixture_is_corrected_as_it_is_trained(workspace: Workspace, mixture: str) -> None:
    """While it teaches a shallower model, too, its experts are balanced: by the auxiliary loss and by their biases."""
    common = [*workspace.data, *TRAIN, *BALANCED, "--train-iters", "2", "--eval-iters", "0"]
    alone = ["--pretrained-checkpoint", mixture, "--lr", "4e-4", "--lr-warmup-iters", "1", "--save", "mixture-alone"]
    workspace.run("pretrain_hybrid.py", *common, *alone)
    together = ["--distill-teacher", mixture, "--distill-correct-teacher", "together", "--save", "mixture-together"]
    workspace.run("distill_gpt.py", *STUDENT, *common, *together)
    left, right = (CheckpointReader(workspace.path / name) for name in ("mixture-alone", "mixture-together/teacher"))
    assert left.shapes.keys() == right.shapes.keys()
    for key in left.shapes:
        torch.testing.assert_close(
            right.read(key), left.read(key), rtol=1e-4, atol=1e-6, msg=lambda m, key=key: key + m
        )


def test_weights_alone_can_choose_experts(workspace: Workspace, mixture: str) -> None:
    sizes = SMALLER[: SMALLER.index("--prune-samples")]  # and no data
    flags = ["--load", mixture, "--save", "light", *workspace.data, *sizes, "--prune-width-metric", "magnitude"]
    workspace.run("prune_gpt.py", *flags)
    experts = load_file(workspace.path / "light" / "scores.safetensors")["layers.3.expert"]
    reader = CheckpointReader(workspace.path / mixture)
    names = ("experts.experts.linear_fc1", "experts.experts.linear_fc2", "router")
    squares = [reader.read(f"decoder.layers.3.mlp.{name}.weight").square().flatten(1).sum(1) for name in names]
    torch.testing.assert_close(experts, sum(squares, torch.zeros(())).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune-num-experts", "1"], "as many as a token needs"),
        (["--prune-num-experts", "4", "--tensor-model-parallel-size", "2"], "--sequence-parallel"),
        (["--prune-num-experts", "4", "--expert-model-parallel-size", "4"], "num_experts=6 does not divide"),
        (
            ["--prune-num-experts", "4", "--moe-router-num-groups", "2"],
            "--moe-router-num-groups changes what the model computes",
        ),
    ],
)
def test_bad_requests_end_at_once(workspace: Workspace, mixture: str, flags: list[str], message: str) -> None:
    done = workspace.run("prune_gpt.py", "--load", mixture, "--save", "refused", *workspace.data, *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.path / "refused").exists()
