"""Conversion without any model: what is carried along, what stays as it was, and that nothing is half done."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_directories import ARCH, MAMBA, checkpoint, edit, rewrite, shards, tensors

from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.cli import main
from megatron_ext.errors import CheckpointError, ConfigError


def test_the_first_family_that_can_is_written(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_scaling"]["rope_type"] == "llama3"
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert len(shards(hf)) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(hf).values())
    assert index["weight_map"].keys() == tensors(hf).keys()
    assert "| class | LlamaForCausalLM |" in (hf / "README.md").read_text()


def test_there_and_back_with_files_types_and_padding(hf: Path, tmp_path: Path) -> None:
    arch = to_megatron(hf, tmp_path / "m", vocab_multiple=64)
    assert arch == replace(ARCH, padded_vocab_size=64)
    assert layout.architecture(tmp_path / "m" / "release") == arch
    embedding = CheckpointReader(tmp_path / "m").read("embedding.word_embeddings.weight")
    assert embedding.dtype == torch.bfloat16
    assert embedding[40:].count_nonzero() == 0
    to_hf(tmp_path / "m", tmp_path / "back", shard_bytes=6000)
    names = {path.name for path in hf.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    for name in names - {"README.md", checksums.FILE}:
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes(), name
    before, after = (checksums.Checksums.read(path) for path in (hf, tmp_path / "back"))
    assert before is not None
    assert after is not None
    assert before.files.items() <= after.files.items()  # of what was put there later, too


def test_another_type_leaves_the_recurrence_alone(tmp_path: Path) -> None:
    to_hf(checkpoint(tmp_path / "m", MAMBA), tmp_path / "hf", dtype=torch.float16)
    held = tensors(tmp_path / "hf")
    assert held["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert held["backbone.layers.0.mixer.in_proj.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"


def test_configuration_and_tokenizer_come_from_elsewhere(hf: Path, tmp_path: Path) -> None:
    """As for a student: another size, rows of padding, nothing kept beside it."""
    edit(hf, bos_token_id=7)
    small = checkpoint(tmp_path / "m", replace(ARCH, hidden_size=8, padded_vocab_size=64))
    to_hf(small, tmp_path / "out", like=hf)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["bos_token_id"]) == (8, 40, 7)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert len(tensors(tmp_path / "out")["lm_head.weight"]) == 40
    to_hf(small, tmp_path / "longer", like=hf, vocab_size=60)
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["vocab_size"] == 60
    with pytest.raises(ConfigError, match="1 to 64"):
        to_hf(small, tmp_path / "no", like=hf, vocab_size=65)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        to_hf(small, tmp_path / "no", like=tmp_path)


def test_tied_embeddings_may_be_written_twice(tmp_path: Path) -> None:
    tied = replace(ARCH, untie_embeddings_and_output_weights=False)
    to_hf(checkpoint(tmp_path / "m", tied), tmp_path / "hf", shard_bytes=6000)

    def same(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    def other(held):
        held["lm_head.weight"][0, 0] += 1

    rewrite(tmp_path / "hf", same)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors(tmp_path / "hf"), "model.safetensors")})
    )
    assert to_megatron(tmp_path / "hf", tmp_path / "out") == tied
    rewrite(tmp_path / "hf", other)
    with pytest.raises(CheckpointError, match="embeddings are tied"):
        to_megatron(tmp_path / "hf", tmp_path / "no")


def state_spaces(path: Path, source: Path, **ssm: Any) -> None:
    """What mamba_ssm would have saved for a `Mamba2ForCausalLM` with tied embeddings."""
    path.mkdir()
    held = {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors(source).items()}
    held["lm_head.weight"] = held["backbone.embedding.weight"]
    torch.save(held, path / "pytorch_model.bin")
    mixer = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2} | ssm
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 37, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
    config |= {"rms_norm": True, "ssm_cfg": mixer}
    (path / "config.json").write_text(json.dumps(config))


def test_mamba_ssms_own_layout(tmp_path: Path) -> None:
    tied = replace(MAMBA, untie_embeddings_and_output_weights=False)
    to_hf(checkpoint(tmp_path / "m", tied), tmp_path / "hf")
    state_spaces(tmp_path / "ss", tmp_path / "hf")
    to_megatron(tmp_path / "ss", tmp_path / "from-ss")
    left, right = CheckpointReader(tmp_path / "m"), CheckpointReader(tmp_path / "from-ss")
    assert left.shapes == right.shapes
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)
    to_hf(tmp_path / "from-ss", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "ss" / "config.json").read_bytes()
    to_hf(tmp_path / "from-ss", tmp_path / "other", family="Mamba2ForCausalLM", vocab_size=40)
    old, new = tensors(tmp_path / "hf"), tensors(tmp_path / "other")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    state_spaces(tmp_path / "old", tmp_path / "hf", layer="Mamba1")
    with pytest.raises(CheckpointError, match="'layer' is not supported"):
        to_megatron(tmp_path / "old", tmp_path / "no")
    (tmp_path / "ss" / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="damaged"):
        to_megatron(tmp_path / "ss", tmp_path / "no")


def test_nothing_is_overwritten_and_nothing_half_done_appears(hf: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for run in (lambda: to_megatron(hf, tmp_path / "taken"), lambda: to_hf(tmp_path / "made", tmp_path / "taken")):
        with pytest.raises(CheckpointError, match="exists already"):
            run()
    before = sorted(tmp_path.iterdir())

    def full(done: int, total: int) -> None:
        if done > total / 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        to_megatron(hf, tmp_path / "out", progress=full)
    with pytest.raises(OSError, match="disk full"):
        to_hf(tmp_path / "made", tmp_path / "out", progress=full)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(hf: Path, tmp_path: Path, capsys) -> None:
    words = ["convert", "--from", "hf", "--to", "megatron", str(hf), str(tmp_path / "m")]
    assert main(words) == 0
    assert re.search(r"wrote .*m: 0.00 GB", capsys.readouterr().out)
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", "--from", "megatron", "--to", "hf", str(tmp_path / "m"), str(tmp_path / "back")]) == 0
    for wrong in (["--to", "hf"], ["--to", "megatron", "--like", "x"]):
        assert main(["convert", "--from", "hf", *wrong, str(hf), str(tmp_path / "n")]) == 2
    with pytest.raises(SystemExit, match="2"):  # argparse's, which the numbers' table is given to
        main(["convert", "--from", "hf", "--to", "megatron", "--pad-vocab-to", "0", str(hf), str(tmp_path / "n")])
