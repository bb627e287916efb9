"""A wing of 100 lines (`toy_wing.py`) gets from the engine what a language model gets, without touching it."""

import json

import pytest
import torch
from workspace import Workspace

from megatron_ext import cli
from megatron_ext.checkpoint.reader import CheckpointReader

WING = "tests/support/toy_wing.py"
FLAGS = [
    "--micro-batch-size", "4", "--global-batch-size", "8", "--lr", "1e-2", "--lr-decay-style", "constant",
    "--eval-iters", "2", "--eval-interval", "2", "--save-interval", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run of four steps, without a pause."""
    workspace = Workspace(tmp_path_factory.mktemp("wing"), [])
    workspace.run(WING, *FLAGS, "--train-iters", "4", "--load", "whole", "--save", "whole")
    return workspace


def weights(wing: Workspace, run: str, step: int = 4) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run / f"iter_{step:07d}")
    names = ("first.weight", "first.bias", "last.weight", "last.bias")
    return {name: reader.read(name) for name in names}


def test_a_dry_run_shows_the_model_and_writes_nothing(wing: Workspace) -> None:
    before = sorted(wing.path.rglob("*"))
    said = wing.run(WING, *FLAGS, "--preset", "toy-small", "--train-iters", "4", "--dry-run", "--save", "new").stdout
    assert "toy-small" in said
    assert f"{16 * 65 + 4 * 17:,}" in said
    assert "8 samples, micro-batch 4, 4 steps" in said
    assert sorted(wing.path.rglob("*")) == before


def test_its_run_directory_has_what_every_run_has(wing: Workspace) -> None:
    run = wing.path / "whole"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "metrics.png", "iter_0000002", "iter_0000004"} <= names
    steps = wing.metrics("whole")
    assert [step["samples"] for step in steps] == [8, 16, 24, 32]
    assert all(0 <= step["accuracy"] <= 1 for step in steps)
    assert "val_accuracy" in steps[-1]
    assert cli.main(["verify", str(run)]) == 0


def test_it_goes_on_bit_for_bit(wing: Workspace) -> None:
    flags = [*FLAGS, "--train-iters", "4", "--load", "twice", "--save", "twice"]
    wing.run(WING, *flags, "--exit-interval", "2")
    assert [step["step"] for step in wing.metrics("twice")] == [1, 2]
    wing.run(WING, *flags)
    for name, value in weights(wing, "whole").items():
        assert torch.equal(weights(wing, "twice")[name], value), name
    for name in ("loss", "val_loss", "accuracy", "samples"):
        assert [s.get(name) for s in wing.metrics("twice")] == [s.get(name) for s in wing.metrics("whole")]


def test_another_model_does_not_go_on(wing: Workspace) -> None:
    done = wing.run(
        WING, *FLAGS, "--train-iters", "6", "--load", "whole", "--save", "whole", "--toy-width", "64", ok=False
    )
    assert "a run cannot go on with another model" in done.stderr
    assert "width=64 instead of 32" in done.stderr


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ["--use-distributed-optimizer"]), (2, ["--tensor-model-parallel-size", "2"])],
    ids=["DP2", "TP2"],
)
def test_no_layout_changes_its_result(wing: Workspace, ranks: int, layout: list[str]) -> None:
    flags = [*FLAGS, "--train-iters", "2", "--pretrained-checkpoint", "whole"]
    if not (wing.path / "alone").is_dir():
        wing.run(WING, *flags, "--save", "alone")
    name = layout[0].strip("-")
    wing.run(WING, *flags, *layout, "--save", name, ranks=ranks)
    for key in ("loss", "accuracy", "val_loss", "val_accuracy", "grad_norm"):
        expected = [step[key] for step in wing.metrics("alone") if key in step]
        assert [step[key] for step in wing.metrics(name) if key in step] == pytest.approx(expected, rel=1e-5), key
    for key, value in weights(wing, "alone", 2).items():
        torch.testing.assert_close(weights(wing, name, 2)[key], value, rtol=1e-4, atol=1e-6)


def test_it_trains_in_bf16(wing: Workspace) -> None:
    flags = [*FLAGS, "--train-iters", "2", "--pretrained-checkpoint", "whole"]
    wing.run(WING, *flags, "--bf16", "--save", "bf16")
    found = [step["loss"] for step in wing.metrics("bf16")]
    wing.run(WING, *flags, "--save", "fp32")
    assert found == pytest.approx([step["loss"] for step in wing.metrics("fp32")], rel=2e-2)


def test_what_its_layout_does_not_divide_is_refused(wing: Workspace) -> None:
    flags = [*FLAGS, "--train-iters", "2", "--dry-run"]
    done = wing.run(WING, *flags, "--tensor-model-parallel-size", "2", "--toy-width", "33", ok=False)
    assert "--toy-width does not divide" in done.stderr
    done = wing.run(WING, *flags, "--pipeline-model-parallel-size", "2", ok=False)
    assert "a toy model has no pipeline parallelism" in done.stderr


def test_it_is_measured_and_compared(wing: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """On all samples of the validation split, in the units that the wing gives."""
    done = wing.run(WING, *FLAGS, "--skip-train", "--pretrained-checkpoint", "whole", "--save", "measured")
    results = json.loads((wing.path / "measured" / "results.json").read_text())
    found = results["validation"]
    assert f"validation accuracy {found['accuracy']:.6f} share of images over 64 samples" in done.stdout
    assert found["samples"] == 64
    assert results["val_loss"] == found["loss"]
    whole = weights(wing, "whole")  # the same by a plain formula
    from toy_wing import Shapes

    images = torch.stack([Shapes(64, 1)[i]["image"].flatten() for i in range(64)])
    labels = torch.arange(64) % 4
    logits = (images @ whole["first.weight"].T + whole["first.bias"]).relu() @ whole["last.weight"].T + whole[
        "last.bias"
    ]
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert (
        cli.main(["compare", str(wing.path / "whole"), str(wing.path / "measured"), "--out", str(wing.path / "c")]) == 0
    )
    said = capsys.readouterr().out
    for words in ("validation loss, nats per image", "validation accuracy, share of images", "2,212", "toy"):
        assert words in said
    assert (wing.path / "c" / "comparison.png").is_file()
