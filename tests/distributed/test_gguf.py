"""GGUF files by several processes, and by the command with its proof."""

import shutil
import sys
from pathlib import Path

import fork_server
import gguf_files
import pytest
import torch
from hf_models import make
from run_ranks import run_ranks

from megatron_ext.checkpoint.gguf.convert import to_gguf
from megatron_ext.checkpoint.gguf.source import opened
from megatron_ext.checkpoint.huggingface.convert import to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader

pytestmark = pytest.mark.filterwarnings("ignore")
COMMAND = str(Path(sys.executable).parent / "megatron-ext")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with scaled positions as `gguf/model.gguf`, which the package alone has written."""
    path = tmp_path_factory.mktemp("gguf")
    make("llama3", path / "hf", vocab_size=300)
    metadata, tensors = gguf_files.model("llama", path / "hf")
    config = {"rope_freqs.weight": frequencies(path / "hf")}
    stored = {key: (value, "F16" if value.ndim > 1 else "F32") for key, value in (tensors | config).items()}
    (path / "gguf").mkdir()
    gguf_files.write(path / "gguf" / "model.gguf", "llama", metadata | gguf_files.byte_level(), stored)
    return path


def frequencies(directory: Path):
    """The factors of Llama 3.1's scaling, by transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_pretrained(directory)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (500_000.0 ** (-torch.arange(0, 16, 2) / 16) / scaled).numpy()


def there_and_back(folder: Path, name: str) -> None:
    with opened(folder / "gguf" / "model.gguf") as model:
        to_megatron(model, folder / f"{name}-m")
    to_gguf(folder / f"{name}-m", folder / f"{name}-g" / "model")


def test_two_processes_write_the_same_files(folder: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        (folder / f"{name}-g").mkdir()
        run_ranks(there_and_back, ranks, folder, name)
    one, two = (CheckpointReader(folder / f"{name}-m") for name in ("one", "two"))
    assert one.shapes == two.shapes
    assert all(torch.equal(one.read(key), two.read(key)) for key in one.shapes)
    files = [folder / f"{name}-g" / "model" / "model-F16.gguf" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    sums = [(file.parent / "checksums.json").read_text() for file in files]
    assert sums[0] == sums[1]


def test_the_command_proves_both_ways(folder: Path) -> None:
    """From the directory that holds the file, and to another file; transformers reads both itself."""
    for words in (
        ["--from", "hf", "--to", "megatron", "gguf", "proved", "--verify"],
        ["--from", "megatron", "--to", "gguf", "proved", "written", "--dtype", "bfloat16", "--verify"],
    ):
        done = fork_server.run([COMMAND, "convert", *words], cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "random tokens: largest difference" in done.stdout
        assert "tokens that transformers writes are those that Megatron would" in done.stdout
    assert (folder / "written" / "written-BF16.gguf").is_file()


def test_what_transformers_does_not_read_is_not_proved(folder: Path) -> None:
    make("nemotron", folder / "nemotron", vocab_size=300, head_dim=8)
    to_megatron(folder / "nemotron", folder / "nemotron-m")
    words = ["--from", "megatron", "--to", "gguf", "nemotron-m", "nemotron-g", "--verify"]
    done = fork_server.run([COMMAND, "convert", *words], cwd=folder)
    assert done.returncode == 2
    assert "transformers does not read this model from GGUF" in done.stderr
    shutil.rmtree(folder / "nemotron-g")
