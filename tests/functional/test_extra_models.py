"""Models beside the one that a wing trains (`toy_extras.py`): frozen, and trained, split or whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from toy_extras import ASSISTANT_LR
from toy_wing import Shapes
from workspace import Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from tests.functional.test_toy_wing import FLAGS, weights

WING, EXTRAS = "tests/support/toy_wing.py", "tests/support/toy_extras.py"
LOSSES = ("loss", "teacher_loss", "assistant_loss", "distance")
FROM = ["--pretrained-checkpoint", "student"]
LAYOUTS = {
    "DP2": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    "TP2": ["--tensor-model-parallel-size", "2"],
}


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two classifiers, `given` and `student`, and a run of four steps with models beside the second, `whole`."""
    workspace = Workspace(tmp_path_factory.mktemp("extras"), [])
    workspace.run(WING, *FLAGS, "--train-iters", "2", "--save", "given")
    workspace.run(WING, *FLAGS, "--train-iters", "2", "--seed", "7", "--save", "student")
    workspace.run(EXTRAS, *FLAGS, *FROM, "--train-iters", "4", "--save", "whole")
    return workspace


def logits(images: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """A classifier's, plainly."""
    hidden = (images @ own["first.weight"].T + own["first.bias"]).relu()
    return hidden @ own["last.weight"].T + own["last.bias"]


def batch(split: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of a split as they come: images (n, 64) and labels (n)."""
    samples = [Shapes(start + count, split)[i] for i in range(start, start + count)]
    return torch.stack([s["image"].flatten() for s in samples]), torch.stack([s["label"] for s in samples])


def test_the_frozen_one_stays_as_it_was(wing: Workspace) -> None:
    """It is saved nowhere, and its loss on each batch is that of the checkpoint that it was read from."""
    assert not (wing.path / "whole" / "teacher").exists()
    given = weights(wing, "given", 2)
    for i, step in enumerate(wing.metrics("whole")):
        images, labels = batch(0, 8 * i, 8)
        expected = torch.nn.functional.cross_entropy(logits(images, given), labels)
        assert step["teacher_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_trained_ones_are_saved_beside_and_not_in_it(wing: Workspace) -> None:
    steps = [layout.find(wing.path / name).path for name in ("student", "whole", "whole/assistant")]
    names = [set(layout.read_metadata(step).state_dict_metadata) for step in steps]
    assert names[0] == names[1]
    assert layout.tensors(steps[0]) == layout.tensors(steps[1]) == layout.tensors(steps[2])
    folder = wing.path / "whole" / "map" / "iter_0000004"
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "weight.safetensors"]
    assert json.loads((folder / "state.json").read_text()) == {"samples": 32}
    assert not torch.equal(load_file(folder / "weight.safetensors")["weight"], torch.eye(4))


def test_it_learns_as_it_would_alone(wing: Workspace) -> None:
    """With its own learning rate, and none of the other losses."""
    flags = [*FLAGS, "--pretrained-checkpoint", "given", "--train-iters", "4"]
    wing.run(WING, *flags, "--lr", str(ASSISTANT_LR), "--save", "alone")
    alone, whole = wing.metrics("alone"), wing.metrics("whole")
    assert [step["assistant_loss"] for step in whole] == [step["loss"] for step in alone]
    assert whole[-1]["val_assistant_loss"] == alone[-1]["val_loss"]
    for name, value in weights(wing, "alone").items():
        assert torch.equal(weights(wing, "whole/assistant")[name], value), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_they_go_on_bit_for_bit(wing: Workspace, name: str) -> None:
    flags = [*FLAGS, *FROM, *LAYOUTS[name], "--train-iters", "4"]
    wing.run(EXTRAS, *flags, "--save", f"{name} whole", ranks=2)
    wing.run(EXTRAS, *flags, "--load", f"{name} twice", "--save", f"{name} twice", "--exit-interval", "2", ranks=2)
    wing.run(EXTRAS, *flags, "--load", f"{name} twice", "--save", f"{name} twice", ranks=2)
    runs = [wing.metrics(f"{name} {run}") for run in ("whole", "twice")]
    for key in (*LOSSES, *(f"val_{loss}" for loss in LOSSES), "samples", "grad_norm"):
        assert [step.get(key) for step in runs[0]] == [step.get(key) for step in runs[1]], key
    for folder in ("", "/assistant"):
        for key, value in weights(wing, f"{name} whole{folder}").items():
            assert torch.equal(weights(wing, f"{name} twice{folder}")[key], value), key
    maps = [wing.path / f"{name} {run}" / "map" / "iter_0000004" for run in ("whole", "twice")]
    for file in ("weight.safetensors", "state.json"):
        assert maps[0].joinpath(file).read_bytes() == maps[1].joinpath(file).read_bytes()
    for key in (*LOSSES, "val_assistant_loss"):  # and the layout has changed nothing
        expected = [step[key] for step in wing.metrics("whole") if key in step]
        assert [step[key] for step in runs[0] if key in step] == pytest.approx(expected, rel=1e-5), key


def test_a_replicated_gradient_is_that_of_the_mean(wing: Workspace) -> None:
    """Over micro-batches and ranks, as a plain formula has it; Adam's first moment is a tenth of it."""
    flags = [*FLAGS, *FROM, "--train-iters", "1", "--save-interval", "1", "--clip-grad", "0"]
    wing.run(EXTRAS, *flags, *LAYOUTS["DP2"], "--save", "one step", ranks=2)
    images, _ = batch(0, 0, 8)
    own, target = (logits(images, weights(wing, name, 2)) for name in ("student", "given"))
    matrix = torch.eye(4, requires_grad=True)
    (own @ matrix.T - target).square().sum(-1).mean().backward()
    saved = load_file(wing.path / "one step" / "map" / "iter_0000001" / "weight.safetensors")
    torch.testing.assert_close(saved["exp_avg"], 0.1 * matrix.grad, rtol=1e-4, atol=1e-6)
    # Each of Adam's first steps is the learning rate in each element.
    torch.testing.assert_close(saved["weight"], torch.eye(4) * (1 - 1e-4) - 1e-2 * matrix.grad.sign())


def test_they_train_in_bf16(wing: Workspace) -> None:
    flags = [*FLAGS, *FROM, "--train-iters", "4"]
    wing.run(EXTRAS, *flags, *LAYOUTS["DP2"], "--bf16", "--save", "bf16", ranks=2)
    for key in LOSSES:
        expected = [step[key] for step in wing.metrics("whole")]
        assert [step[key] for step in wing.metrics("bf16")] == pytest.approx(expected, rel=3e-2), key
    assert load_file(wing.path / "bf16/map/iter_0000004/weight.safetensors")["weight"].dtype == torch.float32


def test_they_are_measured_with_the_model(wing: Workspace) -> None:
    """As they were saved with it, on the whole validation split."""
    wing.run(EXTRAS, *FLAGS, "--skip-train", "--pretrained-checkpoint", "whole", "--save", "measured")
    found = json.loads((wing.path / "measured" / "results.json").read_text())["validation"]
    images, labels = batch(1, 0, 64)
    own, given, assistant = (
        logits(images, weights(wing, *where)) for where in (("whole",), ("given", 2), ("whole/assistant",))
    )
    matrix = load_file(wing.path / "whole" / "map" / "iter_0000004" / "weight.safetensors")["weight"]
    entropy = torch.nn.functional.cross_entropy
    expected = {"loss": entropy(own, labels), "assistant_loss": entropy(assistant, labels)}
    expected["distance"] = (own @ matrix.T - given).square().sum(-1).mean()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("name", ["assistant", "map"])
def test_what_is_lost_is_told(wing: Workspace, name: str) -> None:
    lost = wing.path / f"without {name}"
    shutil.copytree(wing.path / "whole", lost, ignore=shutil.ignore_patterns(name))
    flags = [*FLAGS, *FROM, "--train-iters", "6", "--load", str(lost), "--save", str(lost)]
    done = wing.run(EXTRAS, *flags, ok=False)
    assert done.returncode == 2
    assert "what was trained beside the model is not there" in done.stderr
    assert f"{lost / name / 'iter_0000004'}" in done.stderr


def test_a_loss_scale_is_refused(wing: Workspace) -> None:
    flags = [*FLAGS, *FROM, "--train-iters", "2", "--fp16", "--save", "refused"]
    done = wing.run(EXTRAS, *flags, ok=False)
    assert done.returncode == 2
    assert "models that are trained beside another do not go with --fp16" in done.stderr
    assert not (wing.path / "refused").exists()


def test_the_reader_reads_what_trained_beside(wing: Workspace) -> None:
    """An ordinary checkpoint: another run begins with it."""
    assert CheckpointReader(wing.path / "whole/assistant/iter_0000004").read("first.weight").shape == (32, 64)
    flags = [*FLAGS, "--pretrained-checkpoint", "whole/assistant", "--train-iters", "1"]
    wing.run(WING, *flags, "--save", "from the assistant")
