"""What lies beside the weights: the tokenizer goes wherever the model goes."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from random_models import random_weights

from megatron_ext import cli
from megatron_ext.checkpoint import gpt
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.tokenizer import fingerprint
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.architecture import Architecture

ARCH = Architecture(
    pattern="*-*-", hidden_size=16, padded_vocab_size=40, max_position_embeddings=64, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=8, position_embedding_type="rope",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A model that was trained with a tokenizer in the folder of the job."""
    with writing(tmp_path / "run", ARCH, Namespace(tokenizer_model="data/tokenizer")) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor.bfloat16())
    return tmp_path / "run"


def tokenizer(path: Path, size: int = 30) -> Path:
    """A tokenizer of so many words, of which 3 ends a text; one number is not taken."""
    from tokenizers import Tokenizer, models

    path.mkdir()
    words = {f"w{number}": number for number in range(size) if number != 5}
    Tokenizer(models.WordLevel(words, "w0")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "w3"}, "bos_token": null}')
    return path


def test_the_tokenizer_lies_with_the_run_or_is_asked_for(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer DIR") as error:
        to_hf(run, tmp_path / "no")
    assert "got:   data/tokenizer" in str(error.value)
    to_hf(run, tmp_path / "without", vocab_size=40)
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    own = tokenizer(tmp_path / "own")
    to_hf(run, tmp_path / "given", tokenizer=own)
    hf_assets.keep_tokenizer(own, run)
    (own / "tokenizer_config.json").write_text('{"eos_token": "w3"}')
    hf_assets.keep_tokenizer(own, run)
    assert (run / "tokenizer" / "tokenizer_config.json").read_text() == '{"eos_token": "w3"}'
    to_hf(run, tmp_path / "kept")
    for name in ("given", "kept"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [None, 3, None]
        assert config["vocab_size"] == 30
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == {"eos_token_id": 3}
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="more words than the model"):
        to_hf(run, tmp_path / "no", tokenizer=tokenizer(tmp_path / "large", 41))
    other = run.with_name("fingerprinted")
    with writing(other, ARCH, Namespace(tokenizer_fingerprint=fingerprint(own))) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor.bfloat16())
    with pytest.raises(ConfigError, match="another tokenizer"):
        to_hf(other, tmp_path / "no", tokenizer=tokenizer(tmp_path / "small", 20))
    with pytest.raises(ConfigError, match="no such tokenizer"):
        to_hf(run, tmp_path / "no", tokenizer=tmp_path)
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_is_handed_on(run: Path, tmp_path: Path) -> None:
    hf_assets.keep_tokenizer(tokenizer(tmp_path / "own"), run)
    gpt.to_gpt(run, tmp_path / "gpt")
    gpt.to_pattern(tmp_path / "gpt", tmp_path / "again")
    assert hf_assets.tokenizer(tmp_path / "again" / "release") == tmp_path / "again" / "tokenizer"


def test_damage_to_what_lies_beside_is_found(run: Path, tmp_path: Path) -> None:
    hf_assets.keep_tokenizer(tokenizer(tmp_path / "own"), run)
    to_hf(run, tmp_path / "exported")
    to_megatron(tmp_path / "exported", tmp_path / "imported")
    for place, folder in ((run, hf_assets.TOKENIZER_FOLDER), (tmp_path / "imported", hf_assets.FOLDER)):
        assert cli.main(["verify", str(place)]) == 0
        file = place / folder / "tokenizer.json"
        content = file.read_bytes()
        file.write_bytes(content.replace(b"w7", b"v7"))
        assert cli.main(["verify", str(place)]) == 2
        with pytest.raises(CheckpointError, match=f"damaged: {folder}/tokenizer.json"):
            to_hf(place, tmp_path / "no")
        file.write_bytes(content)
        to_hf(place, tmp_path / f"again {folder}")
