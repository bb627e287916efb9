"""A changed byte is found when it is read, and the file that has it is named."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_ext import cli
from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.checksums import Checksums, verify_step
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.shards import Shards, writing_shards
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="*", hidden_size=16, padded_vocab_size=32)
DAMAGED = "is not what was written"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a dry run in this process has said of ranks: each would look at its share only."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    with writing(tmp_path / "model", ARCH) as writer:
        for key, shape in axes.tensors(ARCH).items():
            writer.write(key, torch.randn(shape))
    return tmp_path / "model" / "release"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(content)


def read_all(step: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(step)
    return {key: reader.read(key) for key in reader.shapes}


def load(step: Path) -> None:
    """What a program does before it reads."""
    verify_step(layout.find(step).path)


def copy_all(reader: CheckpointReader, destination: Path) -> None:
    with writing(destination, ARCH) as writer:
        for key in reader.shapes:
            writer.copy(key, reader.entries[key], reader.chunks(key))


def test_every_byte_of_a_step_counts(step: Path) -> None:
    """Some of an index make it one of another format, or one that asks for code."""
    load(step)
    for file in (step / "__0_0.distcp", step / ".metadata", step / "metadata.json"):
        size = file.stat().st_size
        for place in range(0, size, max(1, size // 40)):
            flip(file, place)
            with pytest.raises(CheckpointError, match=file.name if file.suffix == ".distcp" else None):
                load(step)
            flip(file, place)
    assert verify_step(step)


def test_ranks_share_the_work(step: Path) -> None:
    flip(step / "__0_0.distcp", 5000)
    found = []
    for rank in range(3):
        try:
            verify_step(step, share=(rank, 3))
        except CheckpointError:
            found.append(rank)
    assert len(found) == 1


def test_what_is_read_is_compared(step: Path, tmp_path: Path) -> None:
    """And what is copied as it is."""
    whole = read_all(step)
    storage = layout.read_metadata(step).storage_data
    key = max(whole, key=lambda name: whole[name].numel())
    (place,) = (info.offset + info.length // 2 for index, info in storage.items() if index.fqn == key)
    flip(step / "__0_0.distcp", place)
    reader = CheckpointReader(step)
    with pytest.raises(CheckpointError, match=f"__0_0.distcp {DAMAGED}"):
        reader.read(key)
    with pytest.raises(CheckpointError, match=DAMAGED):
        copy_all(reader, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    others = [name for name in whole if name != key]
    assert all(torch.equal(reader.read(name), whole[name]) for name in others)
    flip(step / "__0_0.distcp", place)
    copy_all(reader, tmp_path / "copy")
    assert verify_step(tmp_path / "copy" / "release")


def test_without_checksums_those_of_torch_are_compared(step: Path, tmp_path: Path) -> None:
    """Where it has made any: our writer has not."""
    (step / checksums.FILE).unlink()
    assert not verify_step(step)
    read_all(step)
    foreign = tmp_path / "foreign"
    save({"w": torch.randn(64, 64)}, storage_writer=FileSystemWriter(foreign), no_dist=True)
    assert not verify_step(foreign)
    (file,) = foreign.glob("*.distcp")
    flip(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{file.name} {DAMAGED}"):
        verify_step(foreign)


def test_a_step_that_is_written_anew_is_not_complete_meanwhile(step: Path) -> None:
    layout.verify(step)
    checksums.forget(step)
    with pytest.raises(CheckpointError, match="incomplete"):
        layout.verify(step)


def test_damaged_checksums_say_so(step: Path) -> None:
    for place in range(0, (step / checksums.FILE).stat().st_size - 1, 29):
        flip(step / checksums.FILE, place)
        with pytest.raises(CheckpointError, match="the checksums cannot be read"):
            verify_step(step)
        flip(step / checksums.FILE, place)
    assert verify_step(step)
    (step / checksums.FILE).unlink()
    assert Checksums.read(step) is None


def test_every_byte_of_an_export_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name: torch.randn(5, 3) for name in "abc"}
    described = {name: TensorEntry(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with writing_shards(tmp_path, described, shard_bytes=130) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2

    def read() -> None:
        shards = Shards(tmp_path)
        for name in tensors:
            shards.fill(name, place := torch.empty(5, 3))
            assert torch.equal(place, tensors[name])

    read()
    for file in files:
        for at in range(0, file.stat().st_size, 7):
            flip(file, at)
            with pytest.raises(CheckpointError, match=r"damaged|shard|type that is not converted"):
                read()
            flip(file, at)
    read()
    assert cli.main(["verify", str(tmp_path)]) == 0
    flip(files[0], files[0].stat().st_size - 1)
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert files[0].name in capsys.readouterr().out
    (tmp_path / "tokenizer.json").touch()
    assert [path.name for path in hf_assets.files(tmp_path)] == ["tokenizer.json"]


def test_the_command_looks_at_every_step(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(step, second := step.with_name("iter_0000002"))
    assert cli.main(["verify", str(step.parent)]) == 0
    flip(second / "__0_0.distcp", 3000)
    assert cli.main(["verify", str(step.parent)]) == 2
    said = capsys.readouterr()
    assert f"{step}: all checksums are right" in said.out
    assert f"{second}: the checkpoint is damaged: __0_0.distcp {DAMAGED}" in said.out
    assert f"got:   {second}" in said.err
    assert cli.main(["verify", str(second)]) == 2
    assert cli.main(["verify", str(step.parent.parent)]) == 2
    assert "nothing that can be verified" in capsys.readouterr().err
