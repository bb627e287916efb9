"""`--verify` finds what a conversion has lost, and does not call a right one wrong."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import make
from random_models import random_weights
from run_ranks import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.writer import writing
from megatron_ext.conversion import verify
from megatron_ext.errors import CheckpointError
from megatron_ext.models import architecture
from megatron_ext.models.architecture import Architecture

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = Architecture(
    pattern="*-*-", hidden_size=32, padded_vocab_size=96, max_position_embeddings=64, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=16, mamba_num_heads=8, position_embedding_type="rope",
)  # fmt: skip


def verified(hf: Path, megatron: Path, lost: str | None = None) -> str:
    """What `verify` prints, or the error; with a bug in the conversion, which loses a field of each architecture."""
    if lost is not None:
        whole, default = architecture.fields_of, getattr(Architecture, lost)
        architecture.fields_of = lambda args, names: whole(args, names) | {lost: default}
    printed = io.StringIO()
    try:
        if lost is not None:
            to_hf(megatron, hf)
        with contextlib.redirect_stdout(printed):
            verify.verify(hf, megatron)
    except CheckpointError as error:
        return f"error: {error}"
    finally:
        if not dist.is_initialized():  # for the runner to end
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return printed.getvalue()


def run(*args: Any) -> str:
    return run_ranks(verified, 1, *args)[0]


def test_a_window_is_seen(tmp_path: Path) -> None:
    make("mistral", tmp_path / "hf", max_position_embeddings=256)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    told = run(tmp_path / "hf", tmp_path / "megatron")
    assert "comparing 256 tokens of a context of 256\n" in told
    assert "32 tokens that transformers writes" in told
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 100}))
    assert "error: the models differ on random tokens" in run(tmp_path / "hf", tmp_path / "megatron")


def test_megatrons_side_is_what_the_run_was_trained_with(tmp_path: Path) -> None:
    arch = replace(LLAMA, rope_scaling_factor=None, rotary_percent=0.5)
    with writing(tmp_path / "megatron", arch) as writer:
        for key, weight in random_weights(arch).items():
            writer.write(key, weight.float())
    told = run(tmp_path / "hf", tmp_path / "megatron", "rotary_percent")
    assert "error: the models differ on random tokens" in told


def test_small_time_steps_are_not_clamped(tmp_path: Path) -> None:
    """transformers would, at 0.001: softplus of -9 is an eighth of that."""
    make("nemotron-h", tmp_path / "hf", dt_bias=-9.0)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    told = run(tmp_path / "hf", tmp_path / "megatron")
    assert "transformers clamps time steps below time_step_min=0.001" in told
    assert "random tokens: largest difference" in told


def test_a_limit_is_told_as_exactly_as_what_exceeds_it() -> None:
    one = torch.tensor([[[1.85, 0.0]]])
    with pytest.raises(CheckpointError) as error:
        verify._compared(["text"], [one], [one + 1.99e-4], 1e-4)
    assert "got:   1.990e-04" in str(error.value)
    assert "at most 1.850e-04" in str(error.value)


def test_what_is_written_must_be_megatrons_choice_but_for_ties() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 1] = torch.tensor([0.5, 1.0, 1.0 - 1e-5])
    logits[0, 2] = torch.tensor([2.0, 1.0, 0.0])
    verify._check_written(torch.tensor([[0, 0, 1, 0]]), logits, 2, 1e-4)
    verify._check_written(torch.tensor([[0, 0, 2, 0]]), logits, 2, 1e-4)
    with pytest.raises(CheckpointError, match="token 2 of 2"):
        verify._check_written(torch.tensor([[0, 0, 1, 1]]), logits, 2, 1e-4)


@pytest.mark.parametrize(
    ("context", "config", "vocab", "length", "told"),
    [
        (64, {}, 96, 64, "comparing 64 tokens of a context of 64\n"),
        (2**17, {}, 96, 2048, "comparing 2,048 tokens of a context of 131,072\n"),
        (2**17, {"rope_parameters": {"original_max_position_embeddings": 3000}}, 96, 6000, "comparing 6,000 tokens"),
        (2**17, {"sliding_window": 4096}, 96, 8192, "comparing 8,192 tokens"),
        (2**17, {"sliding_window": 4096}, 2**20, 256, "fewer than twice the window of 4,096"),
    ],
)
def test_the_length_reaches_past_what_the_configuration_names(context, config, vocab, length, told, capsys) -> None:
    arch = replace(LLAMA, max_position_embeddings=context, padded_vocab_size=vocab)
    assert verify._length(arch, config) == length
    assert told in capsys.readouterr().out


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(tmp_path: Path, capsys) -> None:
    """Qwen2's class splits numbers into digits, whatever tokenizer.json says."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.train_from_iterator([verify.TEXT] * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for model_type, told in (("llama", ""), ("qwen2", "takes it for a Qwen2Tokenizer")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        text = verify._text(tmp_path)
        assert text is not None
        assert text.tolist() == [own.encode(verify.TEXT).ids]
        printed = capsys.readouterr().out
        assert told in printed
        assert bool(printed) == bool(told)
