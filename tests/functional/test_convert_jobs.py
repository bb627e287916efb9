"""From Hugging Face into training and back: the programs load what was converted, and what they save is converted."""

import shutil
import sys
from pathlib import Path

import fork_server
import pytest
import torch
from hf_models import make
from random_models import random_weights
from workspace import TRAIN, Workspace

from megatron_ext import cli
from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.convert import to_megatron
from megatron_ext.checkpoint.huggingface.shards import Shards
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing


def convert(workspace: Workspace, *words: str) -> str:
    command = [str(Path(sys.executable).parent / "megatron-ext"), "convert", *words]
    done = fork_server.run(command, cwd=workspace.path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_is_trained_on_two_ranks_and_converted_back(workspace: Workspace) -> None:
    make("qwen3", workspace.path / "hf", vocab_size=512)
    tokenizer = (workspace.path / "data" / "tokenizer" / "tokenizer.json").read_text()
    (workspace.path / "hf" / "tokenizer.json").write_text(tokenizer)
    to_megatron(workspace.path / "hf", workspace.path / "from-hf")
    flags = ["--pretrained-checkpoint", "from-hf", "--save", "trained", "--train-iters", "2"]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    workspace.run("pretrain_hybrid.py", *flags, *workspace.data, *TRAIN, *layout, ranks=2)
    out = convert(workspace, "--from", "megatron", "--to", "hf", "trained", "back", "--like", "hf", "--verify")
    assert "random tokens: largest difference" in out
    assert "text: largest difference" in out
    assert (workspace.path / "back" / "tokenizer.json").read_text() == tokenizer
    assert (workspace.path / "back" / "config.json").read_bytes() == (workspace.path / "hf/config.json").read_bytes()
    assert "tokens in the last run" in (workspace.path / "back" / "README.md").read_text()
    name = "model.layers.0.self_attn.q_norm.weight"
    before, after = torch.empty(16), torch.empty(16)
    Shards(workspace.path / "hf").fill(name, before)
    Shards(workspace.path / "back").fill(name, after)
    assert 0 < float((before - after).abs().max()) < 0.1


def test_the_other_format_is_named(workspace: Workspace, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    megatron, hf = workspace.path / teacher, workspace.path / "empty-hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    for source, directory, hint in (
        ("hf", megatron, "--from megatron --to hf"),
        ("hf", layout.find(megatron).path, "--from megatron --to hf"),
        ("gpt", megatron, "--from megatron"),
        ("megatron", hf, "--from hf --to megatron"),
    ):
        formats = ["--from", source, "--to", "hf" if source == "megatron" else "megatron"]
        assert cli.main(["convert", *formats, str(directory), str(workspace.path / "nothing")]) == 2
        assert hint in capsys.readouterr().err
        assert not (workspace.path / "nothing").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_model_becomes_a_gpt_model_and_a_pattern_again(workspace: Workspace) -> None:
    make("llama3", workspace.path / "hf-llama", vocab_size=128)
    to_megatron(workspace.path / "hf-llama", workspace.path / "llama-whole")
    arch = layout.architecture(layout.find(workspace.path / "llama-whole").path)
    with writing(workspace.path / "llama-pattern", arch) as writer:
        hf_assets.attach(writer, hf_assets.files(workspace.path / "hf-llama"))
        for key, weight in random_weights(arch).items():
            writer.write(key, weight.bfloat16())
    out = convert(workspace, "--from", "megatron", "--to", "gpt", "llama-pattern", "llama-gpt", "--verify")
    assert "random tokens: largest difference" in out
    refused = workspace.run("pretrain_hybrid.py", "--load", "llama-gpt", *workspace.data, *TRAIN, ok=False)
    assert "--from gpt --to megatron" in refused.stderr
    convert(workspace, "--from", "gpt", "--to", "megatron", "llama-gpt", "llama-again")
    old, new = CheckpointReader(workspace.path / "llama-pattern"), CheckpointReader(workspace.path / "llama-again")
    assert all(torch.equal(old.read(key), new.read(key)) for key in old.shapes)
    assert (workspace.path / "llama-again" / "huggingface" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_trained_here_takes_its_tokenizer_along(workspace: Workspace, tmp_path: Path) -> None:
    llama = ["--hybrid-layer-pattern=*-*-", "--hidden-size", "32", "--ffn-hidden-size", "48", "--norm-epsilon", "1e-6"]
    llama += ["--num-attention-heads", "4", "--max-position-embeddings", "64", "--position-embedding-type", "rope"]
    llama += ["--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm", "--train-iters", "1"]
    llama += ["--untie-embeddings-and-output-weights"]
    workspace.run("pretrain_hybrid.py", *llama, *workspace.data, *TRAIN, "--save", "own-llama")
    run, folder = tmp_path / "moved", workspace.path / "own-llama-hf"  # from elsewhere, without the corpus
    shutil.copytree(workspace.path / "own-llama", run)
    shutil.move(workspace.path / "data" / "tokenizer", workspace.path / "gone")
    try:
        elsewhere = Workspace(tmp_path, [])
        out = convert(elsewhere, "--from", "megatron", "--to", "hf", str(run), str(folder), "--verify")
    finally:
        shutil.move(workspace.path / "gone", workspace.path / "data" / "tokenizer")
    assert "text: largest difference" in out
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)  # without padding
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert (model.config.bos_token_id, model.config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)("def add(", max_new_tokens=3)
    assert made[0]["generated_text"].startswith("def add(")
