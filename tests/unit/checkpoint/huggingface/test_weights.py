"""What is wrong with the weights of others is said by name, and nothing is written."""

import os
from pathlib import Path

import pytest
import torch
from hf_directories import rewrite, shards

from megatron_ext.checkpoint import checksums
from megatron_ext.checkpoint.huggingface.convert import to_megatron
from megatron_ext.errors import CheckpointError


def missing(held):
    del held["model.layers.1.mlp.up_proj.weight"]


def extra(held):
    held["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)


def shape(held):
    held["model.norm.weight"] = torch.zeros(15, dtype=torch.bfloat16)


def mixed(held):
    held["model.layers.0.self_attn.k_proj.weight"] = held["model.layers.0.self_attn.k_proj.weight"].float()


def integers(held):
    held["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "model.layers.1.mlp.up_proj.weight is missing"),
        (extra, "model.layers.2.mlp.up_proj.weight is not part of the model"),
        (shape, r"model.norm.weight is \(15,\) instead of \(16,\)"),
        (mixed, "k_proj.weight is torch.float32, the rest of its layer's torch.bfloat16"),
        (integers, "model.norm.weight is torch.int8"),
    ],
)
def test_other_tensors_are_refused_by_name(hf: Path, tmp_path: Path, change, message: str) -> None:
    rewrite(hf, change)
    with pytest.raises(CheckpointError, match=message):
        to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def lost(hf: Path) -> None:
    shards(hf)[0].unlink()


def cut(hf: Path) -> None:
    os.truncate(shards(hf)[1], shards(hf)[1].stat().st_size - 1)


def garbled(hf: Path) -> None:
    shards(hf)[0].write_bytes(b"\xff" * 100)


def bad_header(hf: Path) -> None:
    shards(hf)[0].write_bytes((9).to_bytes(8, "little") + b"{not json")


def astray(hf: Path) -> None:
    first, second = (path.read_bytes() for path in shards(hf)[:2])
    shards(hf)[0].write_bytes(second)
    shards(hf)[1].write_bytes(first)


def no_index(hf: Path) -> None:
    (hf / "model.safetensors.index.json").write_text("[]")


def empty(hf: Path) -> None:
    for path in [*shards(hf), hf / "model.safetensors.index.json"]:
        path.unlink()


def no_config(hf: Path) -> None:
    (hf / "config.json").unlink()


def bad_config(hf: Path) -> None:
    (hf / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lost, r"the shard model-00001-of-\d+.safetensors is missing"),
        (cut, r"model-00002-of-\d+.safetensors is cut short: '.+' is not whole"),
        (garbled, "is damaged"),
        (bad_header, "is damaged"),
        (astray, "is not in the shard that the index names"),
        (no_index, "index of the shards is damaged"),
        (empty, "no weights"),
        (no_config, "no config.json"),
        (bad_config, "config.json is not JSON"),
    ],
)
def test_damage_is_named(hf: Path, tmp_path: Path, damage, message: str) -> None:
    damage(hf)
    (hf / checksums.FILE).unlink()  # as of others
    with pytest.raises(CheckpointError, match=message):
        to_megatron(hf, tmp_path / "out")
