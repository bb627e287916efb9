"""`megatron-ext vision export`: both forms from one start, read back by others than what wrote them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from megatron_ext import cli
from megatron_ext.errors import MegatronExtError
from megatron_ext.vision import export
from megatron_ext.vision.loading import Loaded
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.weights import to_published


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Of a mixer and attention only, which is a preset for as long as these tests run."""
    torch.manual_seed(0)
    network = Network(replace(PRESETS["mambavision-nano"], pattern="C/C/M/S")).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # decays that differ, so that the scan matters
    PRESETS["mambavision-test"] = network.model
    yield network
    del PRESETS["mambavision-test"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Path:
    path = tmp_path_factory.mktemp("export")
    torch.save(to_published(network.state_dict(), network.model), path / "nano.pth.tar")
    (path / "names.txt").write_text("\n".join("abcdefghij"))
    return path


def run(here: Path, *words: str | Path) -> int:
    flags = ["--load", here / "nano.pth.tar", "--preset", "mambavision-test"]
    return cli.main(["vision", "export", *map(str, [*flags, *words])])


def test_both_forms_are_the_network(here: Path, network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """At a size that windows do not divide, for another number of images; a second start overwrites nothing."""
    words = ["--onnx", here / "n.onnx", "--torch-export", here / "n.pt2", "--classes", here / "names.txt"]
    assert run(here, *words, "--resolution", "48") == 0
    said = capsys.readouterr().out
    assert f"wrote {here / 'n.onnx'}: 48 x 48 pixels, logits within" in said
    assert sorted(path.name for path in here.iterdir()) == ["n.onnx", "n.pt2", "names.txt", "nano.pth.tar"]
    images = torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        expected = network(images)
        program = torch.export.load(here / "n.pt2").module()
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(here / "n.onnx", full_check=True)
    (found,) = onnxruntime.InferenceSession(here / "n.onnx").run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    kept = {
        entry.key: json.loads(entry.value)
        for entry in onnx.load(here / "n.onnx").metadata_props
        if entry.key in ("classes", "mean", "std")
    }
    assert kept["classes"] == list("abcdefghij")
    assert kept["std"] == pytest.approx([0.229, 0.224, 0.225])
    before = (here / "n.onnx").read_bytes()
    assert run(here, *words) == 2
    assert "--onnx: the file exists already and is not overwritten" in capsys.readouterr().err
    assert (here / "n.onnx").read_bytes() == before


def test_what_gives_other_logits_is_not_kept(tmp_path: Path, network: Network) -> None:
    def write(path: Path):
        path.write_text("another network")
        path.with_name(path.name + ".data").write_text("its weights")
        return lambda images: network(images) + 1e-3

    with pytest.raises(MegatronExtError, match="gives other logits than the network, and is not kept"):
        export.write_checked(tmp_path / "out" / "n.onnx", Loaded(network, tmp_path, None), 32, write)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_wrong_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = here / "same"
    for words, what in (
        ([], "nothing to write"),
        (["--onnx", same, "--resolution", "0"], "--resolution"),
        (["--onnx", same, "--torch-export", same], "both forms into one file"),
        (["--onnx", here / "names.txt" / "n.onnx"], "not a directory"),
    ):
        assert run(here, *words) == 2
        assert what in capsys.readouterr().err
