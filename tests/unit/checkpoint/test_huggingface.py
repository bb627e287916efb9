"""Conversion without any model: what is refused and how it is said, what is carried along, what stays as it was."""

import json
import os
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_weights
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.huggingface import convert, families
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.cli import main
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import PRESETS

ARCH = Architecture(
    pattern="*-*-", hidden_size=16, vocab_size=40, max_position_embeddings=64, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=8, position_embedding_type="rope",
    rotary_base=500_000, rope_scaling_factor=8.0,
)  # fmt: skip
MAMBA = replace(
    ARCH, pattern="MM", position_embedding_type="none", mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=4,
    mamba_num_groups=2,
)  # fmt: skip
HYBRID = replace(MAMBA, pattern="M*")


def checkpoint(path: Path, arch: Architecture = ARCH, dtype: torch.dtype = torch.bfloat16) -> Path:
    with writing(path, arch, Namespace(seq_length=64)) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.to(torch.float32 if key.endswith(("A_log", ".D")) else dtype))
    return path


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Llama in two shards with a tokenizer."""
    to_hf(checkpoint(tmp_path / "made"), tmp_path / "hf", shard_bytes=6000)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"a": 1}')
    return tmp_path / "hf"


def edit(directory: Path, **entries: Any) -> None:
    (directory / checksums.FILE).unlink(missing_ok=True)  # as if it were of others
    path = directory / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in shards(directory) for key, value in load_file(path).items()}


def rewrite(directory: Path, change) -> None:
    """All tensors in one file, after `change(tensors)`."""
    held = tensors(directory)
    change(held)
    for path in [*shards(directory), directory / "model.safetensors.index.json"]:
        path.unlink()
    save_file(held, directory / "model.safetensors")


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
    assert arch == replace(ARCH, vocab_size=64)
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
    small = checkpoint(tmp_path / "m", replace(ARCH, hidden_size=8, vocab_size=64))
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


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "not converted(.|\n)*GemmaForCausalLM(.|\n)*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "'hidden_act' is not supported(.|\n)*'gelu'(.|\n)*'silu'"),
        ({"hidden_size": "absent"}, "no 'hidden_size'"),
        ({"attention_bias": True}, "biases in some linear layers only"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling is not supported(.|\n)*linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor': 2.0"),
        ({"rope_theta": 0.5}, "whole number"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "'sliding_window' is not supported"),
        ({"vocab_size": 41}, r"is \(40, 16\) instead of \(41, 16\)"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not part of the model"),
    ],
)
def test_configurations_that_our_models_cannot_be(hf: Path, tmp_path: Path, entries, message: str) -> None:
    edit(hf, **entries)
    with pytest.raises(CheckpointError) as error:
        to_megatron(hf, tmp_path / "out")
    assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize(
    ("arch", "name", "message"),
    [
        (replace(ARCH, pattern="*-*--"), "LlamaForCausalLM", "LlamaForCausalLM cannot express this layer pattern"),
        (replace(ARCH, layer_sizes={"ffn_hidden_size": (24, 16)}), "LlamaForCausalLM",
         "layer_sizes={'ffn_hidden_size'"),
        (replace(ARCH, position_embedding_type="none"), "LlamaForCausalLM", "rotary positions, the model has none"),
        (replace(ARCH, norm_epsilon=1e-6, zero_centered_norm=True), "Qwen2ForCausalLM",
         "zero_centered_norm=True"),
        (replace(ARCH, hidden_size=18), "LlamaForCausalLM", "MistralForCausalLM has no such condition"),
        (replace(MAMBA, hidden_size=24), "Mamba2ForCausalLM", "whole multiple of the hidden size"),
        (replace(HYBRID, untie_embeddings_and_output_weights=False), "NemotronHForCausalLM", "tied embeddings"),
        (replace(HYBRID, norm_epsilon=1e-6), "NemotronHForCausalLM", "norm_epsilon=1e-06"),
        (replace(HYBRID, pattern="M*-"), "NemotronHForCausalLM", "activation='silu'"),
        (MAMBA, "NemotronHForCausalLM", "--hf-class HybridForCausalLM"),
    ],
)  # fmt: skip
def test_models_that_a_family_cannot_express(tmp_path: Path, arch, name, message: str) -> None:
    source = checkpoint(tmp_path / "m", arch)
    with pytest.raises(CheckpointError) as error:
        to_hf(source, tmp_path / "out", family=name)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_stand_in_gives_its_own_reason(tmp_path: Path) -> None:
    to_hf(checkpoint(tmp_path / "whole", MAMBA), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="--hf-class HybridForCausalLM"):
        to_hf(checkpoint(tmp_path / "cut", replace(MAMBA, hidden_size=24)), tmp_path / "out", like=tmp_path / "hf")


def test_a_relative_that_can_is_chosen(tmp_path: Path) -> None:
    assert to_hf(checkpoint(tmp_path / "a", replace(ARCH, hidden_size=18)), tmp_path / "b").name == "MistralForCausalLM"
    mamba = checkpoint(tmp_path / "c", replace(MAMBA, hidden_size=24))
    assert to_hf(mamba, tmp_path / "d").name == "HybridForCausalLM"
    uneven = checkpoint(tmp_path / "f", replace(ARCH, pattern="*-*--"))
    assert to_hf(uneven, tmp_path / "g").name == "PrunedLlamaForCausalLM"
    with pytest.raises(ConfigError, match="did you mean 'LlamaForCausalLM'"):
        to_hf(mamba, tmp_path / "e", family="LLamaForCausal")


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


def test_old_and_new_configurations_say_the_same(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    new = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    family = families.named("LlamaForCausalLM")
    assert family.read(config) == family.read(new) == ARCH
    other = family.write(replace(ARCH, rotary_base=10_000, rope_scaling_factor=None), new)
    assert other["rope_parameters"] == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert "rope_theta" not in other
    hybrid = families.named("NemotronHForCausalLM")
    arch = replace(PRESETS["nemotron-h-8b"].architecture, max_position_embeddings=4096)
    written = hybrid.write(arch, {"hybrid_override_pattern": "M", "num_hidden_layers": 1})
    assert (written["hybrid_override_pattern"], written["num_hidden_layers"]) == (arch.pattern, 52)
    assert "layers_block_type" not in written
    assert hybrid.read(written) == arch


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("llama3.1-8b", "LlamaForCausalLM"),
        ("mistral-nemo-12b", "MistralForCausalLM"),
        ("minitron-8b", "NemotronForCausalLM"),
        ("nemotron-h-8b", "NemotronHForCausalLM"),
        ("mamba2-8b", "Mamba2ForCausalLM"),
        ("llama3.1-minitron-4b-width", "LlamaForCausalLM"),
        ("mn-minitron-8b", "MistralForCausalLM"),
        ("mamba2-hybrid-8b", "HybridForCausalLM"),
        ("tiny-hybrid", "HybridForCausalLM"),
    ],
)
def test_published_models_can_be_expressed(preset: str, family: str) -> None:
    arch = PRESETS[preset].architecture
    chosen = families.named(family)
    written = chosen.write(arch)
    assert not chosen._differences(chosen.read(written), arch)
    covered = {mapping.megatron for mapping in chosen.bind(arch)}
    assert len(covered) == len(convert.axes.tensors(arch))


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
    for wrong in (["--to", "hf"], ["--to", "megatron", "--like", "x"], ["--to", "megatron", "--pad-vocab-to", "0"]):
        assert main(["convert", "--from", "hf", *wrong, str(hf), str(tmp_path / "n")]) == 2
