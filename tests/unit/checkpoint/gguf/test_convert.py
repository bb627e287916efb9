"""Checkpoints as GGUF files: what the `gguf` package reads of them, the way back, and what llama.cpp cannot be told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import torch
from hf_directories import ARCH, HYBRID, checkpoint
from hf_models import make

from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.gguf.convert import KINDS, to_gguf
from megatron_ext.checkpoint.gguf.entries import Described, llama3_factors
from megatron_ext.checkpoint.gguf.file import GgufTensor
from megatron_ext.checkpoint.gguf.layer_sizes import NEURONS
from megatron_ext.checkpoint.gguf.source import opened
from megatron_ext.checkpoint.gguf.tokenizer import write_tokenizer
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.cli import main
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.architecture import Architecture


def export(path: Path, arch: Architecture = ARCH, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return to_gguf(checkpoint(path / "m", arch, dtype), path / "out", **changes)


def values(path: Path) -> dict[str, torch.Tensor]:
    """Each tensor of a file, unpacked by the package."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def back(path: Path, out: Path) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """The model of a file, read again."""
    with opened(path) as model:
        to_megatron(model, out)
    reader = CheckpointReader(out)
    return layout.architecture(reader.step.path), {key: reader.read(key) for key in reader.shapes}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("nemotron", {"head_dim": 8}), ("nemotron", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
     ("mamba2", {}), ("nemotron-h", {})],
    ids=["nemotron", "biases", "mamba2", "nemotron-h"],
)  # fmt: skip
def test_what_is_stored_in_another_form_comes_back(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Norms plus one, decays as rates, shapes of their own."""
    make(name, tmp_path / "hf", vocab_size=300, **changes)
    with_tokenizer(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m")
    path = to_gguf(tmp_path / "m", tmp_path / "out")
    again, weights = back(path, tmp_path / "again")
    reader = CheckpointReader(tmp_path / "m")
    ignored = {"max_position_embeddings": again.max_position_embeddings} if name == "mamba2" else {}
    assert again == replace(layout.architecture(reader.step.path), **ignored)
    assert weights.keys() == reader.shapes.keys()
    for key, value in weights.items():
        assert torch.allclose(value, reader.read(key), rtol=1e-6, atol=1e-6), key
    found = values(path)
    if name == "mamba2":
        stored = reader.read("decoder.layers.1.mixer.A_log")
        assert torch.equal(found["blk.1.ssm_a"], -torch.exp(stored)[:, None])
    elif name == "nemotron":
        norm = reader.read("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
        assert torch.equal(found["blk.0.attn_norm.weight"], norm + 1)


@pytest.mark.parametrize("name", ["llama3", "llama-biases", "mistral", "qwen2", "qwen3"])
def test_there_and_back_is_the_same_model(tmp_path: Path, name: str) -> None:
    """From Hugging Face to GGUF and back, bit for bit; and the file holds what an own writer puts there."""
    make(name, tmp_path / "hf", vocab_size=300)
    with_tokenizer(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m")
    path = to_gguf(tmp_path / "m", tmp_path / "out")
    found, arch = values(path), "llama" if name in ("llama3", "llama-biases", "mistral") else name
    metadata, tensors = gguf_files.model(arch, tmp_path / "hf")
    if name == "llama3":
        assert torch.equal(found.pop("rope_freqs.weight"), llama3_factors(500_000.0, 16, 8.0))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], torch.from_numpy(value)) for key, value in tensors.items())
    written = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    for key, value in metadata.items():
        assert written[arch + key] == pytest.approx(value, rel=1e-6), key
    assert written[f"{arch}.vocab_size"] == len(written["tokenizer.ggml.tokens"]) == 300
    to_hf(tmp_path / "m", tmp_path / "direct")
    with opened(path) as model:
        to_megatron(model, tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "indirect")
    direct, indirect = (tmp_path / side / "model.safetensors" for side in ("direct", "indirect"))
    assert direct.read_bytes() == indirect.read_bytes()
    first, second = (CheckpointReader(tmp_path / side) for side in ("m", "again"))
    assert layout.architecture(first.step.path) == layout.architecture(second.step.path)
    assert (tmp_path / "indirect" / "tokenizer.json").is_file()


def test_other_scalings_of_positions(tmp_path: Path) -> None:
    linear = replace(ARCH, rope_scaling_factor=None, rope_scaling={"rope_type": "linear", "factor": 4.0})
    path = export(tmp_path, linear)
    assert gguf.GGUFReader(path).fields["llama.rope.scaling.type"].contents() == "linear"
    assert back(path, tmp_path / "again")[0] == linear
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(CheckpointError, match=r"scales these rotary positions in another way(.|\n)*dynamic"):
        export(tmp_path / "other", replace(ARCH, rope_scaling_factor=None, rope_scaling=dynamic))


def with_tokenizer(directory: Path) -> None:
    """Add the tokenizer of a GGUF file."""
    embedding = GgufTensor((300, 8), "F32", directory, 0, 32)
    own = {"general.architecture": "llama", "llama.context_length": 64} | gguf_files.byte_level()
    write_tokenizer(Described(directory, own, {"token_embd.weight": embedding}), directory)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 1 / 127)])
def test_types_are_rounded_as_the_package_rounds(tmp_path: Path, kind: str, tolerance: float) -> None:
    arch = replace(ARCH, hidden_size=32, ffn_hidden_size=48)
    exact = values(export(tmp_path, arch))
    path = to_gguf(tmp_path / "m", tmp_path / kind, kind=kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == KINDS[kind]
    assert kinds["blk.1.ffn_down.weight"] == ("F16" if kind == "q8_0" else KINDS[kind])  # rows of 48
    for name, value in values(path).items():
        number = gguf.GGMLQuantizationType[kinds[name]]
        assert torch.equal(value, torch.from_numpy(gguf.dequantize(gguf.quantize(exact[name].numpy(), number), number)))
        assert float((value - exact[name]).abs().max()) <= tolerance * float(exact[name].abs().max())
    assert (
        gguf.GGUFReader(path).fields["general.file_type"].contents() == {"float16": 1, "bfloat16": 32, "q8_0": 7}[kind]
    )


def test_layers_that_differ_become_llama_cpps_own(tmp_path: Path) -> None:
    """Without attention a layer has no heads; without an MLP, or first of all without attention, it gets zeros."""
    arch = replace(ARCH, pattern="-*-*-*", rope_scaling_factor=None, layer_sizes={"ffn_hidden_size": (24, 16, 24)})
    path = export(tmp_path, arch)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.attention.head_count"].contents() == [4, 4, 4, 4]
    assert fields["deci.feed_forward_length"].contents() == [24, 16, 24, NEURONS]
    found = values(path)
    zeros = {name for name, value in found.items() if not value.any()}
    assert {name.split(".")[1] for name in zeros} == {"0", "3"}
    assert {"blk.0.attn_output.weight", "blk.3.ffn_down.weight"} <= zeros
    again, weights = back(path, tmp_path / "again")
    assert again == arch
    reader = CheckpointReader(tmp_path / "m")
    assert weights.keys() == reader.shapes.keys()
    assert all(torch.equal(weights[key], reader.read(key)) for key in weights)


def test_a_later_layer_without_attention_has_no_heads(tmp_path: Path) -> None:
    arch = replace(ARCH, pattern="*--*-", rope_scaling_factor=None)
    path = export(tmp_path, arch)
    fields = gguf.GGUFReader(path).fields
    assert fields["deci.attention.head_count"].contents() == [4, 0, 4]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 0, 2]
    assert back(path, tmp_path / "again")[0] == arch


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (replace(HYBRID, position_embedding_type="rope"), "HybridForCausalLM, layers M\\*"),
        (replace(ARCH, qk_layernorm=True, layer_sizes={"ffn_hidden_size": (24, 16)}), "PrunedQwen3ForCausalLM"),
        (replace(ARCH, activation="gelu", gated_linear_unit=False), "HybridForCausalLM"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(tmp_path: Path, arch: Architecture, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"llama.cpp cannot run this model\n.*{message}"):
        export(tmp_path, arch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"layer_sizes": {"ffn_hidden_size": (24, 16)}}], ids=["alike", "layers that differ"]
)
def test_what_an_architecture_has_no_word_for_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Mistral's window, which llama.cpp's `llama` does not look at."""
    windows = {"attention_windows": (16, 16), "rope_scaling_factor": None}
    with pytest.raises(CheckpointError, match="has no word for attention_windows"):
        export(tmp_path, replace(ARCH, **windows, **changes))
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(checkpoint(tmp_path / "m", ARCH, torch.float32))
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    from megatron_ext.checkpoint.writer import writing

    with writing(tmp_path / "large", ARCH) as writer:
        for name in reader.shapes:
            writer.write(name, reader.read(name) * (1e6 if name == key else 1))
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down.weight does not fit into F16"):
        to_gguf(tmp_path / "large", tmp_path / "out", kind="float16")
    assert not list(tmp_path.glob("*out*"))


def test_nothing_is_overwritten_and_everything_has_a_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export(tmp_path, dtype=torch.bfloat16)
    assert path.name == "out-BF16.gguf"
    with pytest.raises(CheckpointError, match="exists already"):
        to_gguf(tmp_path / "m", tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    sums = checksums.Checksums.read(tmp_path / "out")
    assert sums is not None
    assert sum(size for size, _ in sums.files[path.name].values()) == path.stat().st_size
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(tmp_path / "out")]) == 2
    with pytest.raises(CheckpointError, match="damaged"):
        back(path, tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "hf", "--to", "gguf"], "one of the two formats is megatron"),
        (["--from", "megatron", "--to", "hf", "--dtype", "q8_0"], "--dtype q8_0 goes with --to gguf"),
        (["--from", "gguf", "--to", "megatron", "--like", "x"], "go with --to hf"),
        (["--from", "megatron", "--to", "gguf", "--shard-gb", "1"], "--shard-gb goes with --to hf"),
        (["--from", "hf", "--to", "megatron", "--tokenizer", "x"], "--tokenizer goes with"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *words, str(tmp_path), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_output_is_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "--from", "megatron", "--to", "gguf", str(tmp_path), str(tmp_path / "a.gguf")]
    assert main(words) == 2
    assert "the output is a directory" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    for call in (lambda: to_gguf(tmp_path / "m", tmp_path / "other"), lambda: back(path, tmp_path / "again")):
        with pytest.raises(ConfigError, match=r"need the gguf package(.|\n)*megatron-ext\[gguf\]"):
            call()
