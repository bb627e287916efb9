"""What a file's header says, what blocks of packed numbers mean, and files that are not what they say."""

import struct
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from transformers.integrations.gguf import dequant

from megatron_ext.checkpoint.gguf import file
from megatron_ext.errors import CheckpointError

METADATA = {
    ".block_count": 2, ".rope.freq_base": 10000.0, ".attention.layer_norm_rms_epsilon": 1e-5, "general.name": "é",
    ".attention.causal": True, "tokenizer.ggml.tokens": ["a", "", "ü"], "tokenizer.ggml.scores": [0.5, -1.0, 0.0],
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    return gguf_files.write(tmp_path / "a.gguf", "llama", METADATA, {"w": (values, "Q8_0"), "v": (values[0], "F32")})


def test_the_header_is_what_the_package_reads(small: Path) -> None:
    own, other = file.read(small), gguf.GGUFReader(small)
    for name, field in other.fields.items():
        if not name.startswith("GGUF."):
            theirs = field.contents()
            ours = own.metadata[name]
            assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs), name
    assert own.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5  # and not 9.999999747378752e-06
    assert {name: (tensor.shape, tensor.kind, tensor.offset) for name, tensor in own.tensors.items()} == {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name, tensor.data_offset)
        for tensor in other.tensors
    }


@pytest.mark.parametrize("kind", [*file.PACKED, *file.PLAIN])
def test_values_are_those_of_transformers_own_unpacking(tmp_path: Path, kind: str) -> None:
    """Random blocks; the scales in them are replaced, because some of random bits are not finite."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = 70, 512
    packed = np.random.default_rng(3).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    if kind in file.PLAIN:
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(file.PLAIN[kind])
        packed = values.view(torch.uint8).numpy().reshape(rows, -1)
        expected = values.float()
    else:
        blocks = packed.reshape(-1, size)
        for place in {"Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}.get(kind, [0, 2]):
            scale = np.linspace(-2, 2, len(blocks)).astype(np.float16)
            blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
        if kind in ("Q5_0", "Q5_1"):  # which transformers cannot unpack
            expected = torch.from_numpy(gguf.dequantize(packed, number))
        else:
            expected = dequant.dequantize(torch.from_numpy(packed).flatten(), number.value).view(rows, columns)
    path = gguf_files.write(tmp_path / "a.gguf", "llama", {}, {"w": (packed, kind)})
    stored = file.read(path).tensors["w"]
    assert stored.shape == (rows, columns)
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(rows, columns, dtype=dtype)
        file.unpack(stored, found)
        assert torch.equal(found, expected.to(dtype))
    some = torch.empty(5, columns)
    file.unpack(stored, some, first=7)
    assert torch.equal(some, expected[7:12])


def test_large_tensors_are_unpacked_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((33, 64)).astype(np.float32)
    path = gguf_files.write(tmp_path / "a.gguf", "llama", {}, {"w": (values, "Q4_0")})
    whole, pieces = torch.empty(33, 64), torch.empty(33, 64)
    stored = file.read(path).tensors["w"]
    file.unpack(stored, whole)
    monkeypatch.setattr(file, "_BLOCK_VALUES", 64 * 10)
    file.unpack(stored, pieces)
    assert torch.equal(whole, pieces)


def test_every_cut_and_every_changed_byte_is_told_or_harmless(small: Path, tmp_path: Path) -> None:
    """No length, count or place in a damaged file is believed: nothing hangs, and nothing else is raised."""
    content = small.read_bytes()
    end = file.read(small).tensors["w"].offset
    path = tmp_path / "damaged.gguf"
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        if length < len(content) - 32:  # but for what fills the last block up
            with pytest.raises(CheckpointError):
                file.read(path)
    told = 0
    for place in range(end):
        for value in (0, 255):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                file.read(path)
            except CheckpointError:
                told += 1
    assert told > end / 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 and more", "no GGUF file"),
        (struct.pack("<4sI", b"GGUF", 1), "has a version that is not read"),
        (struct.pack(">4sI", b"GGUF", 3), "is big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60), "header is cut short"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0), "header is cut short"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        file.read(path)
    assert str(path) in str(error.value)


def test_types_that_are_not_converted_are_named(tmp_path: Path) -> None:
    packed = np.zeros((2, 18), dtype=np.uint8)
    path = gguf_files.write(tmp_path / "a.gguf", "llama", {}, {"w": (packed, "IQ4_NL")})
    with pytest.raises(CheckpointError, match="'w' has a type that is not converted") as error:
        file.read(path)
    assert "IQ4_NL" in str(error.value)
    assert "Q4_K" in str(error.value)
