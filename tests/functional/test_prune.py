"""Pruning: any layout measures the same, a masked model equals the sliced one, and bad requests end at once."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import random_weights
from safetensors.torch import load_file
from workspace import Workspace

from megatron_ext import cli
from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.plan import Plan, Provenance

CALIBRATE = ["--prune-samples", "16", "--prune-depth-metric", "loss"]
SMALLER = [
    "--prune-hidden-size", "48", "--prune-ffn-hidden-size", "64", "--prune-num-attention-heads", "2",
    "--prune-mamba-num-heads", "4", "--prune-mamba-head-dim", "8", "--prune-num-layers", "2",
]  # fmt: skip
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M-|*-M-"]),
    "dp2": (2, []),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def pruned(workspace: Workspace, teacher: str) -> str:
    """The teacher cut on every axis, scored on one process."""
    flags = ["--load", teacher, "--save", "pruned", *workspace.data, *CALIBRATE, *SMALLER]
    workspace.run("prune_gpt.py", *flags, draws=True)
    return "pruned"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_no_score_and_no_plan(workspace: Workspace, teacher: str, pruned: str, name: str) -> None:
    ranks, flags = LAYOUTS[name]
    save = f"pruned-{name}"
    flags = ["--load", teacher, "--save", save, *workspace.data, *CALIBRATE, *SMALLER, *flags]
    workspace.run("prune_gpt.py", *flags, ranks=ranks)
    expected = load_file(workspace.path / pruned / "scores.safetensors")
    scores = load_file(workspace.path / save / "scores.safetensors")
    assert scores.keys() == expected.keys()
    for key, value in expected.items():
        # What is left out costs a difference of two losses, each of them exact to 1e-7 or so.
        torch.testing.assert_close(scores[key], value, rtol=1e-4, atol=2e-6 if key.startswith("depth.loss") else 0)
    plans = [Plan.load(workspace.path / run / "plan.json") for run in (pruned, save)]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_only_the_kind_that_is_cut_is_left_out(workspace: Workspace, teacher: str) -> None:
    flags = [*CALIBRATE, "--prune-mlp-layers", "1", "--prune-attention-layers", "0"]
    workspace.run("prune_gpt.py", "--load", teacher, "--save", "by-kind", *workspace.data, *flags)
    depth = {key for key in load_file(workspace.path / "by-kind" / "scores.safetensors") if "loss" in key}
    assert depth == {"depth.loss.mlp"}
    plan = Plan.load(workspace.path / "by-kind" / "plan.json")
    assert sorted(plan.target.pattern) == ["-", "M", "M"]
    assert (workspace.path / "by-kind" / "importance.png").is_file()


@pytest.mark.parametrize("name", ["one", "tp2", "pp2"])
def test_sixteen_bits_measure_nearly_the_same(workspace: Workspace, teacher: str, pruned: str, name: str) -> None:
    """Within 3% of fp32 on average, also where logits are compared; and what is cut is evaluated."""
    ranks, flags = LAYOUTS.get(name, (1, []))
    save, flags = f"pruned-bf16-{name}", [*flags, "--bf16", "--prune-samples", "16", "--prune-cache-gib", "0"]
    metric = ["--prune-depth-metric", "logit_mse"]
    workspace.run(
        "prune_gpt.py", "--load", teacher, "--save", save, *workspace.data, *SMALLER, *flags, *metric, ranks=ranks
    )
    expected = load_file(workspace.path / pruned / "scores.safetensors")
    scores = load_file(workspace.path / save / "scores.safetensors")
    assert scores.keys() - expected.keys() == {"depth.logit_mse.blocks", "depth.logit_distance.blocks"}
    for key, value in expected.items():
        error = (scores[key] - value).norm() / value.norm()
        assert error < (0.15 if key.startswith("depth.loss") else 0.03), key
    alone = load_file(workspace.path / "pruned-bf16-one" / "scores.safetensors")
    for key in ("depth.logit_mse.blocks", "depth.logit_distance.blocks", "hidden"):
        torch.testing.assert_close(scores[key], alone[key], rtol=0.02, atol=0)
    losses = [
        [float(line.split("|")[-2]) for line in (workspace.path / run / "report.md").read_text().splitlines()
         if line.startswith(("| original", "| pruned"))]
        for run in (save, pruned)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    dtypes = layout.tensors(layout.find(workspace.path / save).path).values()
    assert {dtype for _, dtype in dtypes} == {torch.float32}  # weights are copied as they lie


def test_virtual_pipelines_and_sampled_values(workspace: Workspace, teacher: str) -> None:
    """A deeper model, two chunks on each rank; Shapley values draw the same sub-networks everywhere."""
    step = layout.find(workspace.path / teacher).path
    deep = replace(layout.architecture(step), pattern="M-*-M-*-")
    with writing(workspace.path / "deep", deep, layout.common(step)["args"]) as writer:
        for key, tensor in random_weights(deep).items():
            writer.write(key, tensor.float())
    flags = ["--prune-samples", "8", "--prune-num-layers", "3", "--prune-depth-metric", "shapley_loss"]
    flags += ["--prune-shapley-samples", "2", "--prune-ffn-hidden-size", "50", "--prune-per-layer", "ffn"]
    flags += ["--prune-ffn-divisor", "2"]
    chunks = ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M-|*-|M-|*-"]
    for ranks, save, layout_flags in ((1, "deep-1", []), (2, "deep-vpp", chunks)):
        workspace.run(
            "prune_gpt.py", "--load", "deep", "--save", save, *workspace.data, *flags, *layout_flags, ranks=ranks
        )
    left, right = (load_file(workspace.path / save / "scores.safetensors") for save in ("deep-1", "deep-vpp"))
    assert "depth.shapley_loss.blocks" in left
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-5 if key.startswith("depth.shapley") else 0)
    plans = [Plan.load(workspace.path / save / "plan.json") for save in ("deep-1", "deep-vpp")]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert len(set(plans[0].target.layer_sizes["ffn_hidden_size"])) > 1
    # What keeps uneven widths is a model like any other, also on two ranks.
    alone = workspace.loss("deep-1", "loss-uneven")
    assert alone > 0
    more = ["--lr", "1e-3", "--train-iters", "1", "--eval-iters", "0", "--save-interval", "1", "--save", "uneven"]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", "deep-1", *workspace.data, *more, *split, ranks=2)
    assert layout.architecture(layout.find(workspace.path / "uneven").path) == plans[0].target


def test_a_dry_run_says_what_measuring_costs(workspace: Workspace, teacher: str) -> None:
    """Three layers, each left out once, and the whole model."""
    flags = ["--load", teacher, "--save", "dry", *workspace.data, *CALIBRATE, *SMALLER, "--dry-run"]
    done = workspace.run("prune_gpt.py", *flags, "--prune-cache-gib", "0.0009765625")
    assert "4 evaluations of 16 sequences" in done.stdout
    assert "0.00 of 0.00 GiB" in done.stdout
    assert not list(workspace.path.glob("*dry"))


def test_the_run_directory_is_complete(workspace: Workspace, pruned: str) -> None:
    names = {path.name for path in (workspace.path / pruned).iterdir()}
    assert {"plan.json", "scores.safetensors", "config.yaml", "report.md", "importance.png", "release"} <= names


def test_every_file_that_is_left_is_verified(
    workspace: Workspace, pruned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(workspace.path / pruned, tmp_path / "copy")
    assert cli.main(["verify", str(run)]) == 0
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (layout.TRACKER, checksums.FILE)]
    assert {"plan.json", "scores.safetensors", "report.md", "tokenizer.json"} <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert cli.main(["verify", str(run)]) == 2, file
        assert file.name in capsys.readouterr().out
        file.write_bytes(content)
    (run / "plan.json").unlink()
    assert cli.main(["verify", str(run)]) == 2
    assert "plan.json is not what was written" in capsys.readouterr().out


def test_the_report_says_what_changed_and_what_it_cost(workspace: Workspace, pruned: str) -> None:
    run = workspace.path / pruned
    plan = Plan.load(run / "plan.json")
    report = (run / "report.md").read_text()
    assert f"| parameters | {plan.source.num_parameters():,} | {plan.target.num_parameters():,} |" in report
    assert "| hidden channels | 64 | 48 | 75% |" in report
    for line in ("KV cache per token", "SSM cache per sequence", "per decoded token at 1 x 8,192 tokens", "| layers |"):
        assert line in report
    losses = [float(line.split("|")[-2]) for line in report.splitlines() if line.startswith(("| original", "| pruned"))]
    assert losses[1] > losses[0] > 1  # nothing was retrained
    assert (run / "loss.png").stat().st_size > 5000


def test_rounds_make_one_plan_whatever_the_layout(workspace: Workspace, teacher: str) -> None:
    """Each round measures what the one before left; the outcome is one cut of the original."""
    flags = ["--prune-samples", "8", "--prune-hidden-size", "32", "--prune-ffn-hidden-size", "48"]
    flags += ["--prune-num-layers", "2", "--prune-iterations", "2"]
    for ranks, save in ((1, "rounds"), (2, "rounds-dp2")):
        workspace.run("prune_gpt.py", "--load", teacher, "--save", save, *workspace.data, *flags, ranks=ranks)
    left, right = (Plan.load(workspace.path / save / "plan.json") for save in ("rounds", "rounds-dp2"))
    assert left.fingerprint == right.fingerprint
    assert (left.target.hidden_size, left.target.ffn_hidden_size, len(left.target.layers.blocks)) == (32, 48, 2)
    second = load_file(workspace.path / "rounds" / "scores.round-2.safetensors")
    assert second["hidden"].shape == (48,)
    assert "| after round 1 |" in (workspace.path / "rounds" / "report.md").read_text()
    assert not list(workspace.path.glob(".rounds*"))
    assert sum(
        value.numel() for value in map(CheckpointReader(workspace.path / "rounds").read, axes.keys(left.target))
    ) == (left.target.num_parameters())


def test_cutting_again_by_the_scores_gives_the_same_weights(workspace: Workspace, teacher: str, pruned: str) -> None:
    scores = f"{pruned}/scores.safetensors"
    # Neither data nor tokenizer.
    workspace.start("prune_gpt.py", "--load", teacher, "--save", "again", "--prune-scores", scores, *SMALLER)
    left, right = CheckpointReader(workspace.path / pruned), CheckpointReader(workspace.path / "again")
    assert left.shapes == right.shapes
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)


def test_a_masked_model_equals_the_sliced_one(workspace: Workspace, teacher: str, pruned: str) -> None:
    """What the plan drops is set to zero in the full-size model instead, which then must have the sliced one's loss.

    A norm over fewer channels divides by fewer: the masked model's norm weights and epsilon make up for it. The weights
    are loud (ten times the initial ones), so that every slice matters and the fixed epsilon of the gated norm does not.
    """
    plan = Plan.load(workspace.path / pruned / "plan.json")
    reader = CheckpointReader(workspace.path / teacher)
    source, target = plan.source, plan.target
    args = layout.common(reader.step.path)["args"]
    loud = {key: reader.read(key) * (10 if reader.read(key).dim() == 2 else 1) for key in axes.keys(source)}
    with writing(workspace.path / "loud", source, args) as writer:
        for key, tensor in loud.items():
            writer.write(key, tensor)
    apply(replace(plan, provenance=Provenance()), workspace.path / "loud", workspace.path / "sliced")

    hidden = math.sqrt(target.hidden_size / source.hidden_size)
    inner = math.sqrt(target.mamba_inner_size / source.mamba_inner_size)
    # x / sqrt(sum / H + e H'/H), times sqrt(H'/H), is x / sqrt(sum / H' + e).
    full = replace(source, norm_epsilon=source.norm_epsilon * hidden**2)
    with writing(workspace.path / "masked", full, args) as writer:
        for key, tensor in loud.items():
            layer, weight = axes.locate(source, key)
            if layer is not None and layer not in plan.units:
                if weight.name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")):
                    tensor.zero_()  # a sub-layer that adds nothing is one that is not there
            else:
                for dimension, index in enumerate(axes.indices(source, key, plan.kept(layer))):
                    if index is not None:
                        mask = torch.zeros(tensor.shape[dimension], dtype=torch.bool)
                        mask[index] = True
                        tensor.movedim(dimension, 0)[~mask] = 0
                if "layer_norm" in key or "final_norm" in key:
                    tensor *= hidden
                elif key.endswith("mixer.norm.weight"):
                    tensor *= inner
            writer.write(key, tensor)
    sliced, uncut = (workspace.loss(name, f"loss-{name}") for name in ("sliced", "loud"))
    assert abs(sliced - uncut) > 0.1  # the cut is felt
    assert workspace.loss("masked", "loss-masked") == pytest.approx(sliced, rel=1e-5)


@pytest.mark.parametrize("step", [2, 4])
def test_keeping_everything_is_the_identity(workspace: Workspace, teacher: str, step: int) -> None:
    """Of the step that was asked for."""
    source = workspace.path / teacher / f"iter_{step:07d}"
    Plan.keep_everything(layout.architecture(source)).save(workspace.path / "identity.json")
    flags = ["--prune-plan", "identity.json", "--ckpt-step", str(step), *workspace.data]
    workspace.run("prune_gpt.py", "--load", teacher, "--save", f"identity-{step}", *flags)
    left, right = CheckpointReader(source), CheckpointReader(workspace.path / f"identity-{step}")
    assert left.shapes == right.shapes
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)
    if step == 4:
        assert workspace.loss("identity-4", "loss-identity") == workspace.loss(teacher, "loss-teacher")


def test_a_pruned_model_trains_on(workspace: Workspace, pruned: str) -> None:
    flags = ["--lr", "1e-3", "--train-iters", "2", "--eval-iters", "0", "--save-interval", "2", "--save", "retrained"]
    workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", pruned, *workspace.data, *flags, ranks=2)
    assert len(workspace.metrics("retrained")) == 2


def test_what_is_to_be_pruned_is_asked_for(workspace: Workspace) -> None:
    """By the one flag that says it; warnings of other packages do not stand before it."""
    done = workspace.run("prune_gpt.py", *SMALLER, ok=False)
    assert done.stderr.startswith("error: no model given")
    assert done.stderr.endswith("legal: --load CHECKPOINT\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune-target-params", "1e-6"], "no plan reaches the target"),
        (["--prune-num-attention-heads", "3"], "cannot be cut to 3"),
        (["--prune-samples", "3", "--prune-hidden-size", "48"], "--prune-samples must be a multiple"),
        ([], "--prune-target-params"),
        (["--prune-plan", "foreign.json"], "the plan belongs to another model"),
        # The teacher was saved after two steps as well: the same model with other weights.
        (["--prune-plan", "pruned/plan.json", "--ckpt-step", "2"], "a plan of other weights of this model"),
        (["--prune-scores", "pruned/scores.safetensors", "--ckpt-step", "2", *SMALLER], "scores of other weights"),
    ],
)
def test_bad_requests_end_at_once(
    workspace: Workspace, teacher: str, pruned: str, flags: list[str], message: str
) -> None:
    arch = layout.architecture(layout.find(workspace.path / teacher).path)
    Plan.keep_everything(replace(arch, hidden_size=128)).save(workspace.path / "foreign.json")
    done = workspace.run("prune_gpt.py", "--load", teacher, "--save", "refused", *workspace.data, *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.path / "refused").exists()
