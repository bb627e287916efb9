"""Hugging Face directories of others: which files are read, and which are not, wherever names and links lead."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_weights
from safetensors.torch import load_file, save_file

from megatron_ext import cli
from megatron_ext.checkpoint.huggingface import families, hf_assets
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.models.architecture import Architecture

ARCH = Architecture(
    pattern="*-*-", hidden_size=16, padded_vocab_size=40, max_position_embeddings=64, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=8, position_embedding_type="rope",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
KEY = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in shards."""
    path = tmp_path_factory.mktemp("made")
    with writing(path / "m", ARCH, Namespace()) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor)
    to_hf(path / "m", path / "hf", shard_bytes=12_000)
    (path / "hf" / "LICENSE").write_text("free")
    return path / "hf"


@pytest.fixture
def hf(made: Path, tmp_path: Path) -> Path:
    """The same, in a directory of its own."""
    return Path(shutil.copytree(made, tmp_path / "hf"))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def held(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in shards(directory) for key, value in load_file(path).items()}


def norm(tmp_path: Path, source: Path) -> torch.Tensor:
    """The last norm of a converted directory."""
    to_megatron(source, tmp_path / "out")
    return CheckpointReader(tmp_path / "out").read("decoder.final_norm.weight")


def reindex(hf: Path, name: str) -> None:
    index = json.loads((hf / INDEX).read_text())
    old = shards(hf)[0].name
    index["weight_map"] = {key: name if file == old else file for key, file in index["weight_map"].items()}
    (hf / INDEX).write_text(json.dumps(index))


def shard_above(hf: Path, outside: Path) -> None:
    shards(hf)[0].rename(outside / "x.safetensors")
    reindex(hf, "../outside/x.safetensors")


def shard_elsewhere(hf: Path, outside: Path) -> None:
    shards(hf)[0].rename(outside / "x.safetensors")
    reindex(hf, str(outside / "x.safetensors"))


def named_above(hf: Path, outside: Path) -> None:
    save_file(held(hf), outside / "x.safetensors")
    config = json.loads((hf / "config.json").read_text()) | {"transformers_weights": "../outside/x.safetensors"}
    (hf / "config.json").write_text(json.dumps(config))


def linked(name: str) -> Any:
    def change(hf: Path, outside: Path) -> None:
        path = shards(hf)[0] if name == "shard" else hf / name
        path.rename(outside / path.name)
        path.symlink_to(os.path.join("..", "outside", path.name))

    return change


def linked_folder(hf: Path, outside: Path) -> None:
    shards(hf)[0].rename(outside / "x.safetensors")
    (hf / "inner").symlink_to(outside)
    reindex(hf, "inner/x.safetensors")


OUTSIDE = {
    "an index names a file above": shard_above,
    "an index names an absolute path": shard_elsewhere,
    "the configuration names a file above": named_above,
    "a shard is a link": linked("shard"),
    "the index is a link": linked(INDEX),
    "the configuration is a link": linked("config.json"),
    "what would be copied is a link": linked("LICENSE"),
    "a folder within is a link": linked_folder,
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_is_read_or_copied(hf: Path, tmp_path: Path, change: Any) -> None:
    (tmp_path / "outside").mkdir()
    (hf / "checksums.json").unlink()  # as of others
    change(hf, tmp_path / "outside")
    with pytest.raises(UntrustedError, match=r"outside|leads out"):
        to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["huggingface", "huggingface/config.json", "tokenizer", "tokenizer/tokenizer.json"])
def test_a_checkpoint_hands_nothing_on_from_outside(hf: Path, tmp_path: Path, name: str) -> None:
    to_megatron(hf, tmp_path / "m")
    if name.startswith("tokenizer"):
        shutil.rmtree(tmp_path / "m" / "huggingface")
        (tmp_path / "m" / "tokenizer").mkdir()
        (tmp_path / "m" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "m" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedError, match="leads out"):
        to_hf(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def no_object(hf: Path) -> None:
    (hf / "config.json").write_text("[" * 100_000)


def no_file(hf: Path) -> None:
    (hf / "config.json").unlink()
    (hf / "config.json").mkdir()


@pytest.mark.parametrize("change", [no_object, no_file])
def test_a_configuration_that_is_none_is_named(hf: Path, tmp_path: Path, change: Any) -> None:
    change(hf)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        to_megatron(hf, tmp_path / "out")


def test_every_file_of_an_export_is_verified_but_its_card(hf: Path, capsys: Any) -> None:
    (hf / "LICENSE").unlink()  # which was put there later
    for file in sorted(hf.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert cli.main(["verify", str(hf)]) == (0 if file.name == hf_assets.CARD else 2), file
        assert file.name == hf_assets.CARD or file.name in "".join(capsys.readouterr())
        file.write_bytes(content)
    assert cli.main(["verify", str(hf)]) == 0


def test_a_snapshot_of_the_hub_is_read(hf: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--llama"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(hf.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    to_megatron(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "huggingface" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "huggingface" / "LICENSE").is_symlink()


def bin_of(hf: Path, content: dict[str, Any], **options: Any) -> None:
    for path in hf.glob("*.safetensors*"):
        path.unlink()
    torch.save(content, hf / "pytorch_model.bin", **options)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_file_is_read_in_both_of_its_forms(hf: Path, tmp_path: Path, archive: bool) -> None:
    weights = held(hf)
    bin_of(hf, weights, _use_new_zipfile_serialization=archive)
    assert torch.equal(norm(tmp_path, hf), weights[KEY])


def test_pickled_files_are_read_by_their_index(hf: Path, tmp_path: Path) -> None:
    weights = held(hf)
    bin_of(hf, {})
    names = list(weights)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, keys in parts.items():
        torch.save({key: weights[key] for key in keys}, hf / file)
    (hf / "pytorch_model.bin").unlink()
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(norm(tmp_path, hf), weights[KEY])


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_file_runs_nothing(hf: Path, tmp_path: Path, archive: bool) -> None:
    bin_of(hf, {KEY: Bomb(tmp_path / "hit")}, _use_new_zipfile_serialization=archive)
    with pytest.raises(UntrustedError, match=r"asks for posix\.mkdir(.|\n)*pytorch_model\.bin"):
        to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "hit").exists()


def new_weights(hf: Path) -> dict[str, torch.Tensor]:
    """Other values, in one file beside the shards and their index."""
    weights = {key: value + 1 for key, value in held(hf).items()}
    save_file(weights, hf / "model.safetensors")
    return weights


@pytest.mark.parametrize("gone", [True, False])
def test_one_file_is_read_before_an_index(hf: Path, tmp_path: Path, caplog: Any, gone: bool) -> None:
    weights = new_weights(hf)
    if gone:
        for path in shards(hf):
            path.unlink()
    assert torch.equal(norm(tmp_path, hf), weights[KEY])
    assert "reading model.safetensors, as transformers does, and not model" in caplog.text


@pytest.mark.parametrize("form", ["one file", "shards"])
def test_what_nothing_names_is_not_read(hf: Path, tmp_path: Path, caplog: Any, form: str) -> None:
    weights = held(hf)
    if form == "one file":
        save_file(weights, hf / "model.safetensors")
        for path in [*shards(hf), hf / INDEX]:
            path.unlink()
    save_file({"output.weight": torch.zeros(2)}, hf / "consolidated.safetensors")
    assert torch.equal(norm(tmp_path, hf), weights[KEY])
    assert "and not consolidated.safetensors" in caplog.text


def test_weights_under_no_known_name_are_listed(hf: Path, tmp_path: Path) -> None:
    (hf / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"no weights(.|\n)*model-00001(.|\n)*model\.safetensors, model"):
        to_megatron(hf, tmp_path / "out")


@pytest.mark.parametrize("header", ['{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}', "[" * 100_000])
def test_a_header_of_wrong_values_is_damaged(hf: Path, tmp_path: Path, header: str) -> None:
    shards(hf)[0].write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match="is damaged"):
        to_megatron(hf, tmp_path / "out")


def test_code_of_others_is_not_handed_on_as_ours(tmp_path: Path) -> None:
    family: Any = families.named("PrunedLlamaForCausalLM")
    arch = Architecture(**{**vars(ARCH), "pattern": "*-*"})
    config = family.write(arch)
    foreign = config | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    assert family.write(arch, foreign) == config
