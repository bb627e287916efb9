import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megatron_ext.errors import ConfigError
from megatron_ext.models.presets import PRESETS, preset


def as_published(text: str) -> tuple[float, float]:
    """A published count and half a unit of its last digit."""
    digits, unit = re.fullmatch(r"([\d.]+)([BM])", text).groups()
    scale = {"B": 1e9, "M": 1e6}[unit]
    decimals = len(digits.partition(".")[2])
    return float(digits) * scale, 0.5 * 10**-decimals * scale


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_published_ones(name):
    entry = PRESETS[name]
    for text, embedding in ((entry.parameters, True), (entry.non_embedding, False)):
        if text is not None:
            expected, tolerance = as_published(text)
            assert entry.architecture.num_parameters(embedding=embedding) == pytest.approx(
                expected, abs=1.01 * tolerance
            )


@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        (
            "llama3.1-8b",
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                vocab_size=128256,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
            LlamaForCausalLM,
        ),
        (
            "mistral-nemo-12b",
            MistralConfig(
                hidden_size=5120,
                intermediate_size=14336,
                num_hidden_layers=40,
                head_dim=128,
                vocab_size=131072,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
            MistralForCausalLM,
        ),
        (
            "llama3.1-minitron-4b-width",
            LlamaConfig(
                hidden_size=3072,
                intermediate_size=9216,
                num_hidden_layers=32,
                vocab_size=128256,
                head_dim=128,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
            LlamaForCausalLM,
        ),
    ],
)
def test_parameters_equal_those_of_the_transformers_model(name, config, model):
    with torch.device("meta"):
        expected = sum(p.numel() for p in model(config).parameters())
    assert PRESETS[name].architecture.num_parameters() == expected


def test_the_studys_hybrid_has_its_24_4_28_layers():
    layers = PRESETS["mamba2-hybrid-8b"].architecture.layers
    assert [len(layers.indices(kind)) for kind in "M*-"] == [24, 4, 28]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_splits_over_two_by_two(name):
    PRESETS[name].architecture.validate(tp=2, pp=2)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'tiny-hybrid'\?"):
        preset("tiny-hybird")
