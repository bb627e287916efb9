"""A depth metric and a divergence that are declared outside the package, in one place each, do all that ours do."""

import json
import math
import re
from pathlib import Path

import fork_server
import pytest
import torch
from safetensors.torch import load_file
from workspace import TRAIN, Workspace, checked

from tests.functional.test_distill import STUDENT

PRUNE = """
import sys
from math import exp
from megatron_ext.cli import main
from megatron_ext.pruning.aggregations import AGGREGATIONS, Aggregation
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, LeaveOut
AGGREGATIONS["twice_the_mean"] = Aggregation(lambda x: (x.abs(), x.abs()), lambda sums, count: sums.sum(0) / count)
DEPTH_METRICS["twice_l2"] = Change(lambda move: 2 * move.update.norm(dim=-1) / move.length)
DEPTH_METRICS["perplexity"] = LeaveOut(lambda outcome: exp(outcome.loss))
sys.exit(main(["prune", *sys.argv[1:]]))
"""
DISTILL = """
import sys
from megatron_ext.cli import main
from megatron_ext.lm_head import divergences
def half_kl(student, teacher, vocabulary, gradient):
    whole = divergences.forward_kl(student, teacher, vocabulary, gradient)
    return whole._replace(value=whole.value / 2, grad=None if whole.grad is None else whole.grad / 2)
divergences.DISTRIBUTIONS["half-kl"] = half_kl
sys.exit(main(["distill", *sys.argv[1:]]))
"""
CUT = ["--prune-num-sublayers", "3", "--prune-samples", "8"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Programs of another package."""
    folder = tmp_path_factory.mktemp("outside")
    for name, code in {"prune": PRUNE, "distill": DISTILL}.items():
        (folder / f"{name}.py").write_text(code)
    return {name: folder / f"{name}.py" for name in ("prune", "distill")}


def cut(workspace: Workspace, program: Path, teacher: str, metric: str, ok: bool = True, ranks: int = 1) -> str:
    """Prune by a metric, which also names the run directory; what the program says."""
    words = ["--load", teacher, "--save", f"by-{metric}", *workspace.data, *CUT, "--prune-depth-metric", metric]
    done = checked(fork_server.run([program, *words], ranks, workspace.path), ok)
    return done.stdout + done.stderr


def test_an_aggregation_of_widths(workspace: Workspace, teacher: str, programs: dict[str, Path]) -> None:
    """Over the tokens and over the samples: four times what the means are."""
    found = []
    for how in ("mean", "twice_the_mean"):
        words = ["--load", teacher, "--save", f"widths-{how}", *workspace.data, "--prune-hidden-size", "48"]
        words += ["--prune-samples", "8", "--prune-batch-aggregation", how, "--prune-sequence-aggregation", how]
        checked(fork_server.run([programs["prune"], *words], 2, workspace.path), True)
        found.append(load_file(workspace.path / f"widths-{how}" / "scores.safetensors"))
    mean, twice = found
    assert {"hidden", "state"} <= {name.split(".")[-1] for name in mean}
    for name, score in mean.items():
        if not name.startswith("depth"):  # a state's is a product of two
            torch.testing.assert_close(twice[name], (16 if name.endswith(".state") else 4) * score)


def test_a_change_of_the_stream(workspace: Workspace, teacher: str, programs: dict[str, Path]) -> None:
    cut(workspace, programs["prune"], teacher, "twice_l2", ranks=2)
    run = workspace.path / "by-twice_l2"
    scores = load_file(run / "scores.safetensors")
    for name in ("", ".blocks"):
        torch.testing.assert_close(scores[f"depth.twice_l2{name}"], 2 * scores[f"depth.relative_l2{name}"])
    order = scores["depth.twice_l2"].argsort(descending=True)[:3]
    plan = json.loads((run / "plan.json").read_text())
    assert plan["units"] == sorted(order.tolist())
    assert plan["provenance"]["metric"].endswith("depth by twice_l2")


def test_what_is_lost_without_a_layer(workspace: Workspace, teacher: str, programs: dict[str, Path]) -> None:
    cut(workspace, programs["prune"], teacher, "perplexity")
    run = workspace.path / "by-perplexity"
    scores = load_file(run / "scores.safetensors")
    (loss,) = re.findall(r"\| original \| [\d,]+ \| ([\d.]+) \|", (run / "report.md").read_text())
    expected = scores["depth.loss"].double().expm1() * math.exp(float(loss))
    torch.testing.assert_close(scores["depth.perplexity"].double(), expected, rtol=1e-3, atol=1e-3)


def test_without_the_declaration_it_is_no_metric(
    workspace: Workspace, teacher: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text(PRUNE.replace("DEPTH_METRICS[", "dict()["))
    said = cut(workspace, plain, teacher, "twice_l3", ok=False)
    assert "--prune-depth-metric: no such value" in said
    assert "perplexity" not in said
    said = cut(workspace, programs["prune"], teacher, "twice_l3", ok=False)
    assert "did you mean 'twice_l2'?" in said
    assert "perplexity" in said


def test_a_divergence(workspace: Workspace, teacher: str, programs: dict[str, Path]) -> None:
    words = [*STUDENT, "--distill-teacher", teacher, *workspace.data, *TRAIN, "--train-iters", "2"]
    losses = {}
    for name, more in {"forward-kl": [], "half-kl": ["--distill-kd-weight", "2"]}.items():
        run = [programs["distill"], *words, "--distill-loss", name, *more, "--save", f"with-{name}"]
        checked(fork_server.run(run, 1, workspace.path), ok=True)
        losses[name] = workspace.metrics(f"with-{name}")
    for ours, theirs in zip(losses["forward-kl"], losses["half-kl"], strict=True):
        assert theirs["kd_loss"] == pytest.approx(ours["kd_loss"] / 2, rel=1e-6)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-6)
    done = fork_server.run([programs["distill"], "--help"], 1, workspace.path)
    assert "half-kl" in done.stdout
