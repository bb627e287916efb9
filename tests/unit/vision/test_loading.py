"""Which network a command works on, by a published file of the smallest preset; what is wrong is told."""

import argparse
from pathlib import Path

import pytest
import torch

from megatron_ext import cli
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.vision import command_options, loading
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.weights import to_published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = Network(PRESETS["mambavision-nano"])
    path = tmp_path_factory.mktemp("published") / "nano.pth.tar"
    torch.save({"state_dict": to_published(network.state_dict(), network.model)}, path)
    return path


def read(*words: str | Path) -> loading.Loaded:
    parser = argparse.ArgumentParser()
    command_options.export(parser)
    return loading.load(parser.parse_args([str(word) for word in words]))


def test_a_published_file_is_its_network(published: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = Network(PRESETS["mambavision-nano"]).eval()
    images = torch.randn(2, 3, 32, 32)
    loaded = read("--load", published, "--preset", "mambavision-nano")
    torch.testing.assert_close(loaded.network(images), expected(images))
    assert loaded.name(3) == "class 3"
    assert loaded.numbers is None
    about = loaded.about()
    assert about is not None
    assert about["architecture"]["num_parameters"] == expected.model.num_parameters()
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {n}" for n in range(10)) + "\n")
    assert read("--load", published, "--preset", "mambavision-nano", "--classes", names).name(3) == "digit 3"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "does not say which network it is of"),
        (["--preset", "mambavision-nanno"], "did you mean 'mambavision-nano'"),
        (["--preset", "mambavision-t"], "lacks tensors of this network"),
        (["--preset", "mambavision-nano", "--averaged"], "no average of its weights"),
        (["--preset", "mambavision-nano", "--classes", "many.txt"], "there are more names than classes"),
        (["--preset", "mambavision-nano", "--classes", "none.txt"], "names of classes cannot be read"),
    ],
)
def test_what_is_wrong_is_told(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.txt").write_text("name\n" * 11)
    with pytest.raises(MegatronExtError, match=what):
        read("--load", published, *words)


def test_a_folder_is_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a checkpoint says it itself"):
        read("--load", tmp_path, "--preset", "mambavision-nano")
    with pytest.raises(MegatronExtError, match="no complete checkpoint"):
        read("--load", tmp_path)


def test_an_action_that_was_meant_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["vision", "evalute", "--load", "x"])
    assert "did you mean 'evaluate'? one of evaluate, predict, export" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["vision", "predict", "--help"])
    assert "usage: megatron-ext vision predict" in capsys.readouterr().out
