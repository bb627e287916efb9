import io
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.blocks import DiskFile
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import CheckpointWriter, writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="M-*", hidden_size=16, padded_vocab_size=32)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in axes.tensors(ARCH).items()}
    return {key: value if key.endswith("A_log") else value.bfloat16() for key, value in tensors.items()}


def save(path, tensors, args=None):
    with writing(path, ARCH, args) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    save(tmp_path / "out", weights(), Namespace(lr=1e-3, iteration=7, consumed_train_samples=9, hidden_size=99))
    reader = CheckpointReader(tmp_path / "out")
    for key, tensor in weights().items():
        assert reader.read(key).dtype == tensor.dtype
        assert torch.equal(reader.read(key), tensor)
    args = layout.common(reader.step.path)["args"]
    assert (args.lr, args.iteration, args.consumed_train_samples, args.hidden_size) == (1e-3, 0, 0, 16)
    assert layout.architecture(reader.step.path) == ARCH
    assert (tmp_path / "out" / layout.TRACKER).read_text() == "release"


def test_torchs_own_loader_reads_it(tmp_path):
    save(tmp_path / "out", weights())
    loaded: dict[str, Any] = {key: torch.empty_like(tensor) for key, tensor in weights().items()}
    loaded["decoder.layers.0.mixer.in_proj._extra_state/shard_0_1"] = io.BytesIO()
    load(loaded, storage_reader=FileSystemReader(tmp_path / "out" / "release"), no_dist=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights().items())


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    big = torch.zeros(1000, 1000)
    with DiskFile(tmp_path / "data") as file:
        CheckpointWriter(tmp_path, file).write("x", big[:2, :2])
    assert (tmp_path / "data").stat().st_size < 5000


@pytest.mark.parametrize(
    "parts", [[(0, 0, 3, 4), (3, 0, 3, 4)], [(0, 0, 6, 1), (0, 1, 6, 3)], [(r, 0, 1, 4) for r in range(6)]]
)
def test_chunks_of_any_grid_make_the_whole(tmp_path, parts):
    whole = torch.arange(24.0).view(6, 4)
    write_chunks(tmp_path, whole, parts)
    assert torch.equal(CheckpointReader(tmp_path).read("w"), whole)


def test_a_copied_tensor_keeps_its_parts(tmp_path):
    whole, parts = torch.arange(24.0).view(6, 4), [(0, 0, 6, 1), (0, 1, 6, 3)]
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    write_chunks(tmp_path / "old", whole, parts)
    with DiskFile(tmp_path / "new" / "__0_0.distcp") as file:
        writer = CheckpointWriter(tmp_path / "new", file)
        reader = CheckpointReader(tmp_path / "old")
        writer.copy("v", reader.entries["w"], reader.chunks("w"))
        writer.finish({})
    _, storage = writer.part()
    assert {tuple(index.offset or ()) for index in storage if index.fqn == "v"} == {(0, 0), (0, 1)}
    assert torch.equal(CheckpointReader(tmp_path / "new").read("v"), whole)


def test_a_missing_chunk_is_an_error(tmp_path):
    write_chunks(tmp_path, torch.arange(24.0).view(6, 4), [(0, 0, 3, 4)])
    with pytest.raises(CheckpointError, match="'w' is not whole"):
        CheckpointReader(tmp_path).read("w")
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        CheckpointReader(tmp_path).read("v")


def test_damaged_bytes_are_an_error(tmp_path):
    write_chunks(tmp_path, torch.arange(24.0).view(6, 4), [(0, 0, 6, 4)])
    size = (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / "__0_0.distcp").write_bytes(b"\0" * size)
    (tmp_path / checksums.FILE).unlink()
    with pytest.raises(CheckpointError, match="'w' cannot be read"):
        CheckpointReader(tmp_path).read("w")


def write_chunks(path, whole, parts):
    """A step with one tensor in several chunks, as several ranks save it."""
    with DiskFile(path / "__0_0.distcp") as file:
        writer = CheckpointWriter(path, file)
        writer.write("w", whole)
        (entry, storage) = writer._metadata["w"], writer._storage
        entry.chunks, position = [], file.tell()
        storage.clear()
        for row, column, rows, columns in parts:
            torch.save(whole[row : row + rows, column : column + columns].clone(), file)
            file.end_part()
            offset = torch.Size((row, column))
            entry.chunks.append(ChunkStorageMetadata(offset, torch.Size((rows, columns))))
            storage[MetadataIndex("w", offset)] = _StorageInfo("__0_0.distcp", position, file.tell() - position)
            position = file.tell()
        writer.finish({})


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "interrupted"])
def test_an_incomplete_checkpoint_never_appears(tmp_path, wrong):
    tensors: dict[str, Any] = weights()
    if wrong == "missing":
        del tensors["decoder.final_norm.weight"]
    if wrong == "extra":
        tensors["output_layer.weight"] = torch.zeros(32, 16)
    if wrong == "shape":
        tensors["decoder.final_norm.weight"] = torch.zeros(15)
    if wrong == "interrupted":
        tensors["decoder.final_norm.weight"] = None
    with pytest.raises((CheckpointError, AttributeError)):
        save(tmp_path / "out", tensors)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    save(tmp_path / "out", weights())
    before = layout.fingerprint(tmp_path / "out" / "release")
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "out", weights())
    assert layout.fingerprint(tmp_path / "out" / "release") == before
