"""Models that no class of transformers can be are exported with code of their own, and say what Megatron's say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make, tokens
from random_models import random_weights
from run_ranks import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.conversion.verify import hf_logits
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from tests.distributed.test_convert import logits_of

pytestmark = pytest.mark.filterwarnings("ignore")
# A layer without attention comes first: the cache of the whole model must not be asked of it.
DENSE = {"pattern": "-*-**-", "layer_sizes": {"ffn_hidden_size": (24, 48, 40)}}
CHANGES: dict[str, dict[str, Any]] = {
    "llama3": DENSE,
    "mistral": {"pattern": "*-*--"},
    "mistral-linear": {"pattern": "L-*L*-L", "linear_rank": 5},
    "nemotron-linear": {"pattern": "LL*L-"},
    "llama3-biases": {"pattern": "-*-*", "add_bias_linear": True},
    "qwen2": DENSE,
    "qwen3": DENSE,
    "phi3": DENSE,
    "glm4": DENSE,
    "gemma2": {
        "pattern": "-*-**-",
        "layer_sizes": {"ffn_hidden_size": (24, 48, 40)},
        "attention_windows": (),
        "hidden_size": 24,
    },
    "gemma3": {"pattern": "*-*-*", "hidden_size": 24},
    "nemotron": DENSE,
    "nemotron-h": {"layer_sizes": {"mamba_num_heads": (4, 2), "ffn_hidden_size": (48, 24)}},
    "nemotron-h-experts": {"pattern": "MEM-*", "layer_sizes": {"mamba_num_heads": (4, 2)}},
}
# Hybrids that were never a model of transformers'.
OWN = Architecture(
    pattern="M-*-M-", hidden_size=32, padded_vocab_size=96, max_position_embeddings=64, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=16, mamba_num_heads=8, mamba_head_dim=8, mamba_state_dim=16,
    mamba_num_groups=2,
)  # fmt: skip
TRAINED = {
    "hybrid-gated": OWN,
    "hybrid-gelu": replace(OWN, activation="gelu", gated_linear_unit=False, untie_embeddings_and_output_weights=False),
    "hybrid-rotary": replace(
        OWN, position_embedding_type="rope", rotary_percent=0.5, rotary_base=500_000, rope_scaling_factor=8.0,
        qk_layernorm=True, layer_sizes={"mamba_num_heads": (8, 4), "ffn_hidden_size": (48, 32, 16)},
    ),
    # Without attention: no layer's cache knows how long the text is.
    "mamba-uneven": replace(OWN, pattern="MM", layer_sizes={"mamba_num_heads": (8, 4)}),
    "mamba-linear": replace(OWN, pattern="ML", linear_rank=3),
    "hybrid-linear": replace(OWN, pattern="M-LL*-", layer_sizes={"ffn_hidden_size": (48, 24)}),
    "mamba-mlps": replace(OWN, pattern="M-M-", layer_sizes={"ffn_hidden_size": (48, 24)}),
}  # fmt: skip
ALL = [*CHANGES, *TRAINED]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `NAME` of transformers, and a cut model with random weights as `NAME-megatron` and `NAME-cut`."""
    path = tmp_path_factory.mktemp("pruned")
    for name, changes in CHANGES.items():
        make(name.removesuffix("-linear").removesuffix("-biases"), path / name)
        to_megatron(path / name, path / f"{name}-whole")
        step = layout.find(path / f"{name}-whole").path
        write_random(path / f"{name}-megatron", replace(layout.architecture(step), **changes), path / name)
        to_hf(path / f"{name}-megatron", path / f"{name}-cut")
    for name, arch in TRAINED.items():
        write_random(path / f"{name}-megatron", arch)
        assert to_hf(path / f"{name}-megatron", path / f"{name}-cut").name == "HybridForCausalLM"
    return path


def write_random(path: Path, arch: Architecture, original: Path | None = None) -> None:
    with writing(path, arch) as writer:
        if original is not None:
            hf_assets.attach(writer, hf_assets.files(original))
        for key, weight in random_weights(arch).items():
            small_steps = 9 if key.endswith("dt_bias") else 0  # such as Nemotron-H's class would clamp
            writer.write(key, weight.float() - small_steps)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()


def test_logits_are_those_of_megatron(models: Path) -> None:
    found: dict[str, Tensor] = run_ranks(logits_of, 1, str(models), ALL, 1, 1)[-1]
    for name in ALL:
        (expected,) = hf_logits(models / f"{name}-cut", [tokens()])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", ALL)
def test_it_generates_with_a_cache_as_without(models: Path, name: str) -> None:
    model, prompt = load(models / f"{name}-cut"), tokens()[:, :5]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(prompt, **options)
    for _ in range(6):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, prompt)


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_is_bit_identical(models: Path, tmp_path: Path, name: str) -> None:
    to_megatron(models / f"{name}-cut", tmp_path / "back")
    old, new = CheckpointReader(models / f"{name}-megatron"), CheckpointReader(tmp_path / "back")
    assert layout.architecture(old.step.path).layer_sizes == layout.architecture(new.step.path).layer_sizes
    assert all(torch.equal(old.read(key), new.read(key)) for key in old.shapes)
    to_hf(tmp_path / "back", tmp_path / "again")
    for file in (models / f"{name}-cut").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes() or file.name == hf_assets.CARD


@pytest.mark.parametrize("name", ALL)
def test_it_is_used_as_any_model_of_transformers(models: Path, tmp_path: Path, name: str) -> None:
    """Forward as it comes, beams, texts of different lengths, saved and loaded again, in bfloat16."""
    model, prompt = load(models / f"{name}-cut"), tokens()[:, :6]
    logits = model(prompt).logits
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(prompt, num_beams=2, **options).shape == (2, 9)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(8) >= 2).long().expand(2, -1)
    made = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(made[:, 2:], model.generate(prompt, attention_mask=mask[:, 2:], **options))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert torch.equal(again(prompt).logits, logits)
    half: Any = again.bfloat16()
    assert (half(prompt).logits.float() - logits).abs().max() < 0.1 * logits.abs().max()
    assert half.generate(prompt, **options).shape == (2, 9)


def test_it_does_not_load_as_what_it_is_not(models: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(models / "qwen3-cut", trust_remote_code=False)


def test_the_class_that_cannot_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot express"):
        to_hf(models / "qwen3-megatron", tmp_path / "out", family="Qwen3ForCausalLM")
    assert not (tmp_path / "out").exists()
