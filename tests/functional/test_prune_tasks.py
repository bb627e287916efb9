"""Layers chosen by a task: scores are those of plain formulas in float64, on every layout, or the harness's own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import winograd
from random_models import random_weights
from safetensors.torch import load_file
from workspace import ROOT, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.writer import writing
from megatron_ext.evaluation.questions import accuracy, texts
from megatron_ext.models.reference import forward

COMMAND = str(Path(sys.executable).parent / "megatron-ext")
SCAN = ["--prune-num-layers", "2", "--prune-depth-metric", "scan_task", "--prune-samples", "8"]
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def plain(workspace: Workspace, teacher: str) -> str:
    """The teacher's architecture without positions, with random weights."""
    step = layout.find(workspace.path / teacher).path
    arch = replace(layout.architecture(step), position_embedding_type="none")
    with writing(workspace.path / "plain", arch, layout.common(step)["args"]) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.float())
    return "plain"


def in_float64(workspace: Workspace, model: str, skip: tuple[int, ...]) -> dict[str, float]:
    """The task's scores without some sub-layers, a text at a time."""
    arch = layout.architecture(workspace.path / model / "release")
    weights = {key: tensor.float().double() for key, tensor in random_weights(arch).items()}
    questions = winograd.questions(None, 64, 0)
    scores = []
    for text in texts(questions, 64):
        tokens = torch.tensor([[*text.prompt, *text.answer]])
        logits = forward(arch, weights, tokens[:, :-1], skip=skip)[0][0, -len(text.answer) :].log_softmax(-1)
        label = torch.tensor(text.answer)
        greedy = bool((logits.argmax(-1) == label).all())
        scores.append((float(logits.gather(-1, label[:, None]).sum()), greedy))
    return accuracy(questions, scores)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_task_is_scored_as_in_float64_on_every_layout(workspace: Workspace, plain: str, metric: str) -> None:
    whole = in_float64(workspace, plain, ())[metric]
    without = [in_float64(workspace, plain, block)[metric] for block in ((0, 1), (2, 3), (4, 5))]
    assert len({*without, whole}) > 2
    task = ["--prune-task", "winograd:questions", "--prune-task-metric", metric]
    for name, (ranks, flags) in LAYOUTS.items():
        if metric == "acc_norm" and name != "one":
            continue
        save = f"judged-{metric}-{name}"
        workspace.run(
            "prune_gpt.py", "--load", plain, "--save", save, *workspace.data, *SCAN, *task, *flags, ranks=ranks
        )
        found = load_file(workspace.path / save / "scores.safetensors")
        assert found["depth.scan_task.blocks.1"].tolist() == pytest.approx([whole - each for each in without])
        report = (workspace.path / save / "report.md").read_text()
        assert f"Score ({metric}) at the task `winograd:questions`" in report
        best = without.index(max(without))
        for place, score in enumerate(without):
            assert f"| {place}{' (the least lost)' if place == best else ''} | {score:.4f} |" in report
        assert f"| none | {whole:.4f} |" in report


def test_a_task_of_the_harness_scores_as_evaluate_does(workspace: Workspace, plain: str) -> None:
    folder = str(ROOT / "tests" / "tasks")
    task = ["--prune-task", "lm_eval:local_many", "--prune-task-metric", "acc_norm", "--prune-task-folder", folder]
    workspace.run("prune_gpt.py", "--load", plain, "--save", "by-harness", *workspace.data, *SCAN, *task)
    flags = ["--tasks", "local_many", "--task-folder", folder, "--tokenizer", "data/tokenizer", "--window", "64"]
    workspace.run(COMMAND, "evaluate", plain, *flags, "--save", "plain-results")
    expected = json.loads((workspace.path / "plain-results" / "results.json").read_text())["tasks"]["local_many"]
    report = (workspace.path / "by-harness" / "report.md").read_text()
    assert f"| none | {expected['acc_norm']:.4f} |" in report
    assert 0 < expected["acc_norm"] < 1


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (["megatron_ext.evaluation.synthetic:copying"], "the model never answers the task"),
        (
            ["lm_eval:local_rolling", "--prune-task-folder", str(ROOT / "tests" / "tasks"), "--prune-task-metric",
             "word_perplexity"], "of which more is better",
        ),
    ],
)  # fmt: skip
def test_a_task_that_cannot_choose_is_refused(workspace: Workspace, plain: str, task: list[str], message: str) -> None:
    flags = ["--load", plain, "--save", "unjudged", *workspace.data, *SCAN, "--prune-task", *task]
    done = workspace.run("prune_gpt.py", *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(workspace.path.glob("*unjudged*"))
