"""`megatron-ext vision` from folders of images to a checkpoint and back: resume, layouts, precision, broken files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.optim import Lamb, param_groups_layer_decay
from torch.nn import functional as F
from workspace import Workspace

from megatron_ext import cli
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.checkpoint import Evaluation, read_evaluation, read_network
from megatron_ext.vision.images import Images, Variations
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.sources import open_source
from megatron_ext.vision.timm_models import TimmMambaVision
from megatron_ext.vision.weights import to_published

PROGRAM = "tests/support/vision_program.py"
CLASSES = ("blue", "green", "red")
FLAGS = [
    "--preset", "mambavision-nano", "--mambavision-pattern", "C/C/MS/M", "--mambavision-classes", "6",
    "--images-train", "train", "--images-valid", "valid", "--micro-batch-size", "4", "--global-batch-size", "8",
    "--lr", "1e-3", "--lr-decay-style", "constant", "--eval-iters", "1", "--eval-interval", "2", "--save-interval", "2",
]  # fmt: skip
PLAIN = ["--images-mixup", "0", "--images-cutmix", "0", "--micro-batch-size", "8"]


@pytest.fixture(scope="module")
def wing(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pictures of three colours, and a run of four steps with every variation and blocks that are skipped."""
    path, generator = tmp_path_factory.mktemp("vision"), np.random.default_rng(0)
    for split, count in (("train", 7), ("valid", 4)):
        for channel, name in enumerate(CLASSES):
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (40, 36, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    workspace = Workspace(path, [])
    workspace.run(PROGRAM, *FLAGS, *DROP, "--train-iters", "4", "--load", "whole", "--save", "whole")
    return workspace


MESA = ["--average-decay", "0.5", "--mesa-weight", "0.1"]
DROP = ["--mambavision-drop-path", "0.3", *MESA, "--mesa-start", "0.5"]


def weights(wing: Workspace, run: str, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(wing.path / run / f"iter_{step:07d}")
    return {name: reader.read(name) for name in reader.shapes if name.startswith("backbone.")}


def test_a_dry_run_shows_network_and_images(wing: Workspace) -> None:
    said = wing.run(PROGRAM, *FLAGS, "--train-iters", "4", "--dry-run", "--save", "new").stdout
    assert "21 for training, 12 for validation" in said
    model = MambaVision(
        pattern="C/C/MS/M", dim=16, stem=16, head_dim=16, window=4, last_window=2, state=4, resolution=32, classes=6
    )
    assert f"{model.num_parameters():,}" in said
    assert "G layers" in said
    assert not (wing.path / "new").exists()


def test_it_goes_on_bit_for_bit(wing: Workspace) -> None:
    """Order, variation, mixing, skipped blocks and batch norm's statistics are those of a run without a pause."""
    flags = [*FLAGS, *DROP, "--train-iters", "4", "--load", "twice", "--save", "twice"]
    wing.run(PROGRAM, *flags, "--exit-interval", "2")
    wing.run(PROGRAM, *flags)
    whole, twice = weights(wing, "whole", 4), weights(wing, "twice", 4)
    assert whole.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    assert any(not torch.equal(value, whole[name]) for name, value in weights(wing, "whole", 2).items())
    assert [step["mesa"] > 0 for step in wing.metrics("whole")] == [False, False, True, True]
    for name in ("loss", "val_loss", "top_1", "samples", "mesa", "val_average_loss"):
        assert [s.get(name) for s in wing.metrics("twice")] == [s.get(name) for s in wing.metrics("whole")]


# From random weights, the same on every layout. With an Adam that divides by no less than .01: the gradient of a bias
# before a norm is rounding alone.
SMOOTH = [*FLAGS, *PLAIN, *MESA, "--mesa-start", "0", "--train-iters", "2", "--adam-eps", "0.01"]


@pytest.fixture(scope="module")
def alone(wing: Workspace) -> list[dict[str, float]]:
    """Two steps of one process in float32."""
    wing.run(PROGRAM, *SMOOTH, "--save", "alone")
    return wing.metrics("alone")


def test_no_layout_changes_its_result(wing: Workspace, alone: list[dict[str, float]]) -> None:
    """Two tensor-parallel ranks, and two data-parallel ones with the distributed optimizer: normed as one batch."""
    wing.run(PROGRAM, *SMOOTH, "--tensor-model-parallel-size", "2", "--save", "tp", ranks=2)
    wing.run(PROGRAM, *SMOOTH, "--micro-batch-size", "4", "--use-distributed-optimizer", "--save", "dp", ranks=2)
    expected = weights(wing, "alone", 2)
    for run in ("tp", "dp"):
        for key in ("loss", "top_1", "mesa", "val_loss", "val_top_1", "val_mesa", "grad_norm"):
            found, right = ([step[key] for step in steps if key in step] for steps in (wing.metrics(run), alone))
            assert found == pytest.approx(right, rel=1e-5, abs=1e-7), (run, key)
        for name, value in weights(wing, run, 2).items():
            assert value.shape == expected[name].shape
            torch.testing.assert_close(
                value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_the_average_of_the_weights(wing: Workspace) -> None:
    """It is the one of the saved steps, goes on with a run that is resumed, is measured, and can be read."""
    flags = [*FLAGS, "--average-decay", "0.75", "--save-interval", "1", "--load", "average", "--save", "average"]
    wing.run(PROGRAM, *flags, "--train-iters", "4", "--exit-interval", "3")
    expected = weights(wing, "average", 1)
    start = CheckpointReader(wing.path / "average" / "iter_0000001")
    first = {name: start.read("average." + name.removeprefix("backbone.").replace(".", "/")) for name in FEW}
    wing.run(PROGRAM, *flags, "--train-iters", "4")
    for step in (2, 3, 4):
        now = weights(wing, "average", step)
        first = {name: 0.75 * value + 0.25 * now[name] for name, value in first.items()}
    found = read_network(wing.path / "average", averaged=True).state_dict()
    for name, value in first.items():
        torch.testing.assert_close(found[name.removeprefix("backbone.")], value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert "val_average_top_1" in wing.metrics("average")[-1]


FEW = [f"backbone.{name}" for name in ("stem.0.weight", "stages.2.blocks.0.mixer.A_log", "norm.running_mean")]


def test_it_trains_in_bf16(wing: Workspace, alone: list[dict[str, float]]) -> None:
    wing.run(PROGRAM, *SMOOTH, "--bf16", "--save", "bf16")
    found = [step["loss"] for step in wing.metrics("bf16")]
    assert found == pytest.approx([step["loss"] for step in alone], rel=3e-2)


@pytest.fixture(scope="module")
def measured(wing: Workspace) -> dict[str, float]:
    """All twelve images, by a checkpoint."""
    flags = ["--micro-batch-size", "4", "--global-batch-size", "4"]
    wing.run(PROGRAM, *FLAGS, *flags, "--skip-train", "--pretrained-checkpoint", "whole", "--save", "measured")
    return json.loads((wing.path / "measured" / "results.json").read_text())["validation"]


LAMB = [
    "--optimizer", "lamb", "--layer-decay", "0.8", "--weight-decay", "0.1", "--clip-grad", "0", "--adam-eps", "0.01",
    "--lr", "0.01",
]  # fmt: skip


def test_lamb_with_learning_rates_by_layer_is_that_of_timm(wing: Workspace) -> None:
    """Three steps of two micro-batches on two tensor-parallel ranks, stopped after two; and timm's on one network."""
    flags = [*FLAGS, *PLAIN, *LAMB, "--pretrained-checkpoint", "whole", "--load", "lamb", "--save", "lamb"]
    flags += ["--tensor-model-parallel-size", "2", "--train-iters", "3", "--micro-batch-size", "4"]
    wing.run(PROGRAM, *flags, "--exit-interval", "2", ranks=2)
    wing.run(PROGRAM, *flags, ranks=2)
    start = read_network(wing.path / "whole")
    network = TimmMambaVision(replace(start.model, drop_path=0.0))
    network.load_state_dict(start.state_dict())
    network.train()
    groups = param_groups_layer_decay(network, weight_decay=0.1, layer_decay=0.8)
    for group in groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizer = Lamb(groups, eps=0.01, max_grad_norm=None)
    variations = Variations(ImageOptions(), network.model)
    samples = Images(open_source(wing.path / "train"), variations.training, 3, 1234, count=24, shuffled=True)
    for step in range(3):
        optimizer.zero_grad()
        for first in (8 * step, 8 * step + 4):
            batch = [samples[i] for i in range(first, first + 4)]
            logits = network(torch.stack([sample["image"] for sample in batch]))
            labels = torch.stack([sample["label"] for sample in batch])
            (F.cross_entropy(logits, labels, label_smoothing=0.1) / 2).backward()
        optimizer.step()
    found = read_network(wing.path / "lamb")
    for (name, ours), theirs, before in zip(
        found.named_parameters(), network.parameters(), start.parameters(), strict=True
    ):
        moved = (theirs - before).norm().item()  # not at all: biases before a norm
        assert (ours - theirs).norm().item() < 1e-4 * moved + 1e-7, name


def test_lamb_in_bf16_goes_on_bit_for_bit(wing: Workspace) -> None:
    flags = [*FLAGS, *LAMB, "--bf16", "--train-iters", "4", "--eval-iters", "0"]
    wing.run(PROGRAM, *flags, "--save", "lamb-whole")
    flags += ["--load", "lamb-twice", "--save", "lamb-twice"]
    wing.run(PROGRAM, *flags, "--exit-interval", "2")
    wing.run(PROGRAM, *flags)
    whole, twice = weights(wing, "lamb-whole", 4), weights(wing, "lamb-twice", 4)
    assert all(torch.equal(value, twice[name]) for name, value in whole.items())
    done = wing.run(PROGRAM, *flags, "--layer-decay", "0.7", "--train-iters", "5", ok=False)
    assert "another --layer-decay changes" in done.stderr


def test_it_is_measured_on_all_images(wing: Workspace, measured: dict[str, float]) -> None:
    """The same by the plain network that a checkpoint is read into."""
    network = read_network(wing.path / "whole")
    variations = Variations(ImageOptions(), network.model)
    samples = list(Images(open_source(wing.path / "valid"), variations.validation, 3, 1234))
    with torch.no_grad():
        logits = network(torch.stack([sample["image"] for sample in samples]))
    labels = torch.stack([sample["label"] for sample in samples])
    assert measured["samples"] == 12
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert measured["top_1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_a_new_run_begins_with_the_weights_of_another(wing: Workspace) -> None:
    """Its average's, split over two ranks; with other classes at another resolution the classifier alone is new."""
    flags = ["--mambavision-classes", "4", "--mambavision-resolution", "48", "--lr", "0", "--train-iters", "1"]
    flags += ["--pretrained-checkpoint", "whole", "--pretrained-averaged", "--tensor-model-parallel-size", "2"]
    said = wing.run(PROGRAM, *FLAGS, *flags, "--load", "tuned", "--save", "tuned", "--average-decay", "0.5", ranks=2)
    assert said.stdout.count("the classifier is new: 4 classes, where there were 6") == 1
    before, after = (read_network(wing.path / run, averaged=True) for run in ("whole", "tuned"))
    assert (after.model.classes, after.model.resolution, after.model.dim) == (4, 48, before.model.dim)
    drawn = dict(after.named_parameters())
    for name, value in before.named_parameters():
        assert torch.equal(value, drawn[name]) == (name not in ("head.weight", "head.bias"))
    assert drawn["head.weight"].shape == (4, 128)
    assert read_evaluation(wing.path / "tuned") == Evaluation(1.0, "bicubic", CLASSES, "train")


def test_frozen_stages_stay_as_they_are(wing: Workspace) -> None:
    """With their statistics, amid a moving average that looks at images in another mode, on two ranks."""
    flags = [*FLAGS, *MESA, "--mesa-start", "0", "--freeze-stages", "3", "--pretrained-checkpoint", "whole"]
    flags += ["--load", "frozen", "--save", "frozen", "--use-distributed-optimizer", "--save-interval", "1"]
    wing.run(PROGRAM, *flags, "--train-iters", "2", "--exit-interval", "1", ranks=2)
    wing.run(PROGRAM, *flags, "--train-iters", "2", ranks=2)
    before, after = (read_network(wing.path / run).state_dict() for run in ("whole", "frozen"))
    trained = ("stages.3.", "downsamples.2.", "norm.", "head.")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (not name.startswith(trained) or name.endswith("mixer.A_log")), name
    done = wing.run(PROGRAM, *flags, "--train-iters", "3", "--freeze-stages", "2", "--dry-run", ok=False)
    assert "another --freeze-stages changes" in done.stderr


def test_published_weights_are_measured(wing: Workspace, measured: dict[str, float]) -> None:
    network = read_network(wing.path / "whole")
    published = {"state_dict": to_published(network.state_dict(), network.model)}
    torch.save(published, wing.path / "published.pth.tar")
    flags = ["--micro-batch-size", "4", "--global-batch-size", "4", "--skip-train", "--save", "published"]
    wing.run(PROGRAM, *FLAGS, *flags, "--pretrained-weights", "published.pth.tar")
    found = json.loads((wing.path / "published" / "results.json").read_text())["validation"]
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-6)


def test_commands_work_on_its_checkpoint(
    wing: Workspace, measured: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured as by the job, and its average by itself; classes have the names of the folders it learned from."""
    monkeypatch.chdir(wing.path)
    flags = ["--load", "whole", "--images-valid", "valid", "--save", "commands"]
    assert cli.main(["vision", "evaluate", *flags]) == 0
    assert cli.main(["vision", "evaluate", *flags, "--averaged"]) == 0
    found = json.loads((wing.path / "commands" / "results.json").read_text())["images"]
    assert found["weights"]["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert found["weights"]["right"] == pytest.approx(12 * measured["top_1"])
    assert found["average"]["loss"] != found["weights"]["loss"]
    capsys.readouterr()
    assert cli.main(["vision", "predict", "valid/red", "--load", "whole", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert {name for line in lines for name, _ in line["classes"]} <= {*CLASSES, "class 3", "class 4", "class 5"}
    assert any(name in CLASSES for line in lines for name, _ in line["classes"])


def test_what_cannot_be_read_is_left_out_counted_and_named(wing: Workspace) -> None:
    shutil.copytree(wing.path / "train", wing.path / "damaged")
    for name in ("blue/3.png", "red/5.png"):
        (wing.path / "damaged" / name).write_bytes((wing.path / "train" / name).read_bytes()[:100])
    flags = [*FLAGS, "--images-train", "damaged", "--global-batch-size", "4", "--eval-iters", "0"]
    done = wing.run(PROGRAM, *flags, "--train-iters", "6", "--save", "left-out")
    for name in ("blue/3.png", "red/5.png"):
        assert done.stderr.count(f"an image cannot be read and is left out: damaged/{name}") == 1
    skipped = sum(step["skipped"] for step in wing.metrics("left-out")) * 4
    assert skipped == pytest.approx(2, abs=1)  # 24 samples of an epoch of 21, of which 2 have no picture


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--images-train", "nowhere"], "no such folder of images"),
        (["--images-augment", "random"], "timm does not know this policy"),
        (["--micro-batch-size", "1"], "images are mixed in pairs"),
        (["--mambavision-classes", "2"], "more classes than the classifier knows"),
        (["--tensor-model-parallel-size", "8"], "attention heads of stage 3 do not divide"),
        (["--hybrid-layer-pattern", "M*"], "this describes a language model"),
        (["--normalization", "RMSNorm"], "got:   --normalization=RMSNorm"),
        (["--optimizer", "lamb", "--use-distributed-optimizer"], "LAMB needs whole weights"),
        (["--optimizer", "lamb", "--fp16"], "scales no losses"),
        (["--freeze-stages", "1"], "what is frozen would stay as it is drawn"),
        (["--layer-decay", "1.5"], "--layer-decay is a share"),
        (["--mesa-start", "0.5"], "no agreement with the average that could begin"),
        (["--mesa-weight", "0.5"], "no average of the weights to agree with"),
        (["--pretrained-averaged"], "no run begins here"),
        (["--pretrained-weights", "nothing.pth.tar"], "no such file of weights"),
        (
            ["--pretrained-checkpoint", "whole", "--mambavision-dim", "32"],
            "tensors of the checkpoint have other shapes",
        ),
        (["--pretrained-checkpoint", "whole", "--mambavision-pattern", "C/C/MS/MM"], "lacks tensors of this network"),
        (["--load", "whole", "--mambavision-classes", "4"], "cannot go on with another model"),
        (["--load", "whole", "--no-load-optim", "--mambavision-classes", "4"], "knows another number of classes"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(wing: Workspace, flags: list[str], what: str) -> None:
    done = wing.run(PROGRAM, *FLAGS, "--train-iters", "1", "--dry-run", *flags, ok=False)
    assert what in done.stderr


def test_jobs_for_language_models_say_what_it_is(wing: Workspace) -> None:
    for script, *flags in (
        ("megatron_ext/__main__.py", "convert", "whole", "out", "--from", "megatron", "--to", "hf"),
        ("megatron_ext/__main__.py", "generate", "whole", "--prompt", "a picture of"),
    ):
        done = wing.run(script, *flags, ok=False)
        assert done.returncode == 2
        assert "the checkpoint holds no language model" in done.stderr
        assert ": mambavision" in done.stderr


def test_samples_do_not_depend_on_who_reads_them(tmp_path: Path) -> None:
    """The same sample whatever was read before; another one in the next epoch; random numbers outside go on."""
    for index in range(5):
        (tmp_path / "one").mkdir(exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "one" / f"{index}.jpg")
    model = MambaVision(pattern="C/C/MS/M", dim=16, head_dim=16, resolution=32)
    transform = Variations(ImageOptions(), model).training
    first, second = (Images(open_source(tmp_path), transform, 3, seed=7, count=20, shuffled=True) for _ in range(2))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    forwards = [first[i]["image"] for i in range(10)]
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(second[i]["image"], forwards[i]) for i in reversed(range(10)))
    assert not any(torch.equal(forwards[i], forwards[i + 5]) for i in range(5))
