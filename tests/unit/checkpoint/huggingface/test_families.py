"""Configurations and models that a family can say, and those that it cannot."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hf_directories import ARCH, HYBRID, MAMBA, checkpoint, edit

from megatron_ext.checkpoint.huggingface import convert, families
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.presets import PRESETS


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "not converted(.|\n)*OPTForCausalLM(.|\n)*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "'hidden_act' is not supported(.|\n)*'gelu'(.|\n)*'silu'"),
        ({"hidden_size": "absent"}, "no 'hidden_size'"),
        ({"attention_bias": True}, "biases in some linear layers only"),
        ({"rope_scaling": {"type": "proportional"}}, "RoPE scaling is not supported(.|\n)*proportional(.|\n)*linear"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "'factor' is below 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "no 'high_freq_factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 2.0}}, "'short_factor' is no list"),
        ({"rope_theta": 0.5}, "whole number"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "bidirectional_attention'",
        ),
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
