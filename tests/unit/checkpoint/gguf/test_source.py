"""A GGUF file read as a Hugging Face model, beside transformers' own reading of the same file."""

import json
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from hf_models import make, tokens

from megatron_ext.checkpoint.gguf.source import find, is_gguf, opened
from megatron_ext.checkpoint.huggingface import families
from megatron_ext.checkpoint.huggingface.convert import to_megatron
from megatron_ext.errors import CheckpointError, ConfigError, UntrustedError


def small(tmp_path: Path, kind: str = "F32", name: str = "llama-biases", **changes: Any) -> Path:
    """A model with a vocabulary of its own; the arguments change metadata, or drop it (None)."""
    arch = name if name.startswith("qwen") else "llama"
    make(name, tmp_path / "hf", vocab_size=300, intermediate_size=64)
    metadata, tensors = gguf_files.model(arch, tmp_path / "hf")
    metadata |= gguf_files.byte_level() | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    stored = {key: (value, kind if value.ndim > 1 else "F32") for key, value in tensors.items()}
    return gguf_files.write(tmp_path / "model.gguf", arch, metadata, stored)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and all tensors."""
    with opened(path) as model:
        made = {}
        for key, entry in model.weights.entries.items():
            made[key] = torch.empty(entry.shape, dtype=entry.dtype)
            model.weights.fill(key, made[key])
        return dict(model.config), made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"), [("llama-biases", "F32"), ("mistral", "F16"), ("qwen2", "Q4_1"), ("qwen3", "Q8_0")]
)
def test_tensors_and_configuration_are_those_that_transformers_reads(tmp_path: Path, name: str, kind: str) -> None:
    """In the type of each: what is packed in blocks is unpacked to 32 bits, bit for bit the same."""
    own = {  # transformers reads no biases, and takes Qwen3's heads to have 128 channels
        "llama-biases": {"attention_bias": False, "mlp_bias": False}, "mistral": {"hidden_size": 96, "head_dim": 16},
        "qwen3": {"head_dim": 128},
    }  # fmt: skip
    sizes = {"intermediate_size": 64} | own.get(name, {})
    arch = name if name.startswith("qwen") else "llama"
    make(name, tmp_path / "hf", vocab_size=300, **sizes)
    metadata, tensors = gguf_files.model(arch, tmp_path / "hf")
    stored = {key: (value, kind if value.ndim > 1 else "F32") for key, value in tensors.items()}
    gguf_files.write(tmp_path / "model.gguf", arch, metadata | gguf_files.byte_level(), stored)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    config, found = read(tmp_path / "model.gguf")
    expected = {key: value for key, value in theirs.state_dict().items() if key in found or "lm_head" not in key}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == (torch.float16 if kind == "F16" and value.dim() > 1 else torch.float32)
        assert torch.equal(value.float(), expected[key]), key
    for entry in ("num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
        if hasattr(theirs.config, entry):
            assert config[entry] == pytest.approx(getattr(theirs.config, entry), rel=1e-6), entry
    assert config["tie_word_embeddings"] == theirs.config.tie_word_embeddings
    arch = to_megatron_arch(tmp_path / "model.gguf", tmp_path / "m")
    assert arch == families.of_config(config).read(config)


def to_megatron_arch(path: Path, out: Path) -> Any:
    with opened(path) as model:
        return to_megatron(model, out)


def test_the_model_computes_what_the_original_does(tmp_path: Path) -> None:
    """The original's logits, from the file that was written in llama.cpp's order of channels."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    expected = make("llama-biases", tmp_path / "hf", vocab_size=300)
    metadata, tensors = gguf_files.model("llama", tmp_path / "hf")
    stored = {key: (value, "F32") for key, value in tensors.items()}
    path = gguf_files.write(tmp_path / "a.gguf", "llama", metadata | gguf_files.byte_level(), stored)
    config, found = read(path)
    (tmp_path / "again").mkdir()
    save_file(found, tmp_path / "again" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(again(tokens()).logits, expected, atol=1e-6)


def test_rows_are_read_alone(tmp_path: Path) -> None:
    path = small(tmp_path, "Q4_0", intermediate_size=None)
    with opened(path) as model:
        for key, entry in model.weights.entries.items():
            whole = torch.empty(entry.shape, dtype=entry.dtype)
            model.weights.fill(key, whole)
            rows = torch.empty(4, *entry.shape[1:], dtype=entry.dtype)
            model.weights.fill(key, rows, (8, 12))
            assert torch.equal(rows, whole[8:12]), key


def test_vectors_take_the_type_of_the_matrices_if_they_lose_nothing(tmp_path: Path) -> None:
    make("qwen3", tmp_path / "hf", vocab_size=300)
    metadata, tensors = gguf_files.model("qwen3", tmp_path / "hf")
    for name, dtype in (("exact", torch.bfloat16), ("rounded", torch.float32)):
        vectors = {key: np.full_like(value, 1 + 2**-7 if name == "exact" else 1.001)
                   for key, value in tensors.items() if value.ndim == 1}  # fmt: skip
        stored = {key: (value, "BF16" if value.ndim > 1 else "F32") for key, value in (tensors | vectors).items()}
        path = gguf_files.write(tmp_path / f"{name}.gguf", "qwen3", metadata | gguf_files.byte_level(), stored)
        with opened(path) as model:
            types = {len(entry.shape): entry.dtype for entry in model.weights.entries.values()}
            assert types == {1: dtype, 2: torch.bfloat16}


def test_llama_3_1_is_recognised_by_its_factors(tmp_path: Path) -> None:
    """The factors are those of transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make("llama3", tmp_path / "hf", vocab_size=300)
    metadata, tensors = gguf_files.model("llama", tmp_path / "hf")
    config = LlamaConfig.from_pretrained(tmp_path / "hf")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** (-torch.arange(0, 16, 2) / 16)
    for factors, right in (((plain / scaled).numpy(), True), (np.linspace(1, 8, 8, dtype=np.float32), False)):
        stored = {key: (value, "F32") for key, value in (tensors | {"rope_freqs.weight": factors}).items()}
        path = gguf_files.write(tmp_path / f"{right}.gguf", "llama", metadata | gguf_files.byte_level(), stored)
        if right:
            scaling = read(path)[0]["rope_scaling"]
            assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
        else:
            with pytest.raises(CheckpointError, match=r"rope_freqs.weight is no scaling"):
                read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".expert_count": 8}, "llama.expert_count is not supported"),
        ({".attention.sliding_window": 16}, "llama.attention.sliding_window is not supported"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}, "rope.scaling.type is not supported"),
        ({".rope.dimension_count": 4}, "rope.dimension_count is not supported"),
        ({".attention.value_length": 16}, "attention.value_length is not supported"),
        ({".block_count": None}, "llama.block_count is missing"),
        ({".block_count": 3}, "model.layers.2.* is missing"),
        ({".block_count": 1}, "blk.1.* is not part of the model"),
        ({".attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({".attention.head_count": "many"}, "attention.head_count is not supported"),
        ({".rope.freq_base": 10000.5}, "base must be a whole number"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer is of a kind that is not converted"),
        ({"tokenizer.ggml.pre": "viking"}, "splits texts in a way that is not converted"),
        ({"tokenizer.ggml.tokens": None}, "the file has no tokenizer"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "the tokenizer is not the model's"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is no token"),
    ],
)  # fmt: skip
def test_what_our_models_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        to_megatron_arch(small(tmp_path, **changes), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", "gemma3", {}, {})
    with pytest.raises(CheckpointError, match="not converted") as error, opened(path):
        pass
    assert "gemma3" in str(error.value)
    assert "qwen3" in str(error.value)


def test_a_model_in_parts_is_one(tmp_path: Path) -> None:
    make("qwen3", tmp_path / "hf", vocab_size=300)
    metadata, tensors = gguf_files.model("qwen3", tmp_path / "hf")
    stored = [{key: (value, "F32") for key, value in list(tensors.items())[part::2]} for part in range(2)]
    both = gguf_files.write(tmp_path / "one.gguf", "qwen3", metadata | gguf_files.byte_level(), stored[0] | stored[1])
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(stored):
        path = tmp_path / "parts" / f"m-{number + 1:05d}-of-00002.gguf"
        own = metadata | gguf_files.byte_level() if number == 0 else {}
        gguf_files.write(path, "qwen3", own | {"split.no": number, "split.count": 2}, part)
    one, parts = read(both)[1], read(tmp_path / "parts")[1]
    assert one.keys() == parts.keys()
    assert all(torch.equal(one[key], parts[key]) for key in one)
    with pytest.raises(CheckpointError, match="a part of a model"):
        read(tmp_path / "parts" / "m-00002-of-00002.gguf")
    (tmp_path / "parts" / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="a part of the model is missing"):
        read(tmp_path / "parts")


def test_a_directory_with_several_asks_which(tmp_path: Path) -> None:
    for name in ("a.Q8_0.gguf", "a.Q4_0.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert is_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="several GGUF files") as error:
        find(tmp_path)
    assert "a.Q4_0.gguf, a.Q8_0.gguf" in str(error.value)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.gguf").symlink_to(tmp_path / "a.Q8_0.gguf")
    with pytest.raises(UntrustedError, match="leads out of the directory"):
        find(tmp_path / "elsewhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find(tmp_path / "b.gguf")
