"""What earlier versions wrote is read, and gives the numbers that it gave them.

`tests/fixtures/before_the_move` was written by the code of a0b69dc: a checkpoint (trained for 4 steps), scores and a
plan that cut it to 0.7, its logit cache, and its export. The numbers are that code's, too.
"""

import shutil
from pathlib import Path

import pytest
from workspace import Workspace

from megatron_ext import cli
from megatron_ext.checkpoint import layout
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_the_move"
DATA = [
    "--data-path", "data/text_document", "--tokenizer-type", "HuggingFaceTokenizer",
    "--tokenizer-model", "data/tokenizer", "--make-vocab-size-divisible-by", "8", "--seq-length", "32",
    "--micro-batch-size", "2", "--global-batch-size", "4", "--padded-vocab-size", "512",
]  # fmt: skip
WHOLE, CUT = 6.216775946647116, 6.223175122303033  # validation losses of both models
KD, LOSS = 7.400528556900099e-05, 6.241458892822266  # of the first step of a distillation from the cache


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The fixtures, where a job may write beside them."""
    path = tmp_path_factory.mktemp("earlier") / "files"
    shutil.copytree(FIXTURES, path)
    return Workspace(path, [*DATA, "--split", "50,50,0"])


def test_a_checkpoint_has_the_loss_that_it_had(earlier: Workspace) -> None:
    assert earlier.loss("run", "whole") == pytest.approx(WHOLE, rel=1e-6)


def test_scores_make_the_plan_that_they_made(earlier: Workspace) -> None:
    flags = ["--load", "run", "--save", "again", "--prune-scores", "pruned/scores.safetensors"]
    earlier.run("prune_gpt.py", *flags, "--prune-target-params", "0.7", "--seq-length", "32")
    made, plan = (Plan.load(earlier.path / name / "plan.json") for name in ("again", "pruned"))
    made, plan = ({k: v for k, v in each.to_dict().items() if k != "provenance"} for each in (made, plan))
    assert made == plan
    assert Scores.load(earlier.path / "pruned" / "scores.safetensors").architecture.pattern == "M-*-"


def test_a_plan_cuts_as_it_did_and_a_cache_teaches_as_it_did(earlier: Workspace) -> None:
    earlier.run("prune_gpt.py", "--load", "run", "--save", "half", "--prune-plan", "pruned/plan.json")
    assert earlier.loss("half", "cut") == pytest.approx(CUT, rel=1e-6)
    flags = ["--pretrained-checkpoint", "half", "--distill-cache", "cache", "--train-iters", "1", "--eval-iters", "0"]
    earlier.run(
        "distill_gpt.py", *flags, *DATA, "--split", "13,12,75", "--lr", "2e-3", "--lr-decay-style", "constant",
        "--clip-grad", "1.0", "--save", "student",
    )  # fmt: skip
    (step,) = earlier.metrics("student")
    assert step["kd_loss"] == pytest.approx(KD, rel=1e-3)  # a small difference of large numbers
    assert step["loss"] == pytest.approx(LOSS, rel=1e-6)


def test_an_export_is_the_checkpoint_that_it_was_made_of(earlier: Workspace) -> None:
    paths = [str(earlier.path / name) for name in ("hf-run", "back")]
    assert cli.main(["convert", "--from", "hf", "--to", "megatron", *paths]) == 0
    assert earlier.loss("back", "returned") == pytest.approx(WHOLE, rel=1e-6)


def test_nothing_of_it_is_damaged(earlier: Workspace) -> None:
    for name in ("run", "cache", "hf-run"):
        assert cli.main(["verify", str(earlier.path / name)]) == 0, name
    args = layout.common(layout.find(earlier.path / "run").path)["args"]
    assert args.hybrid_layer_pattern == "M-*-"
