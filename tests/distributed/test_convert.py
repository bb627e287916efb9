"""A converted model says what the original says, on any layout, and converted back it is the original."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS, SEQUENCE, make, tokens
from random_models import random_scores
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.huggingface.shards import Shards
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.conversion.verify import hf_logits
from megatron_ext.errors import ConfigError
from megatron_ext.models import reference
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.select import make_plan

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with `NAME` and, converted, `NAME-megatron`; and the logits of transformers' models."""
    path = tmp_path_factory.mktemp("convert")
    logits = {name: make(name, path / name) for name in MODELS}
    logits |= {name: make(base, path / name, "3KB", **changes) for name, (base, changes) in ODD.items()}
    for name in (*MODELS, *ODD):
        to_megatron(path / name, path / f"{name}-megatron")
    for name, targets in PRUNED.items():
        small = path / f"{name}-pruned"
        prune(path / f"{name}-megatron", path / f"{name}-pruned-megatron", targets)
        to_hf(path / f"{name}-pruned-megatron", small)
        logits[small.name] = hf_logits(small, [tokens()])[0]
    return path, logits


# What few models have, and classes of transformers can.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.6],
    "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 8.0], "rope_theta": 1e4, "partial_rotary_factor": 0.75,
}  # fmt: skip
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "one-group": ("llama-biases", {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": False}),
    "no-layer-has-the-window": ("qwen2", WINDOW | {"max_window_layers": 2, "head_dim": 24, "num_key_value_heads": 1}),
    "a-quarter-is-rotated": (
        "nemotron",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "experts-not-divided": (
        "qwen3-experts", {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": None},
    ),
    "a-half-is-rotated": (
        "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
                 "tie_word_embeddings": True},
    ),
    "window": ("mistral", {"sliding_window": 7}),
    "window-of-upper-layers": ("qwen2", WINDOW | {"max_window_layers": 1}),
    "window-of-one-layer": ("qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "window-of-experts": ("mixtral-experts", {"sliding_window": 7}),
    "window-phi3": ("phi3", {"sliding_window": 7, "num_key_value_heads": 2}),
    "gemma": ("gemma2", {"class": "Gemma", "tie_word_embeddings": False}),
    "gemma2-odd": (
        "gemma2", {"final_logit_softcapping": None, "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
                   "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": False},
    ),
    "gemma2-without-caps": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma3-odd": (
        "gemma3", {"final_logit_softcapping": 5.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        }, "num_key_value_heads": 4},
    ),
    "bamba-one-group": (
        "bamba", {"mamba_n_groups": 1, "attn_layer_indices": [0, 2], "tie_word_embeddings": True,
                  "mamba_d_head": "auto",
                  "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ),
    "olmo2-odd": ("olmo2", {"head_dim": 24, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "glm": ("glm4", {"class": "Glm", "attention_bias": False, "head_dim": 24, "tie_word_embeddings": True}),
    "linear": ("llama3", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "dynamic": (
        "qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
                  "max_position_embeddings": SEQUENCE // 2},
    ),
    "yarn": (
        "qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                      "original_max_position_embeddings": SEQUENCE // 2}, "head_dim": 24},
    ),
    "yarn-of-its-own": (
        "granite", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 0.7,
                                        "mscale_all_dim": 1.5, "beta_fast": 3, "truncate": False,
                                        "original_max_position_embeddings": 64}},
    ),
    "longrope": (
        "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": SEQUENCE // 2},
    ),
    "longrope-short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}),
    "other-llama3": (
        "llama-biases", {"rope_parameters": {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.5,
                                             "high_freq_factor": 5.0, "rope_theta": 1e4,
                                             "original_max_position_embeddings": 48}},
    ),
    "one-expert-for-each-token": ("nemotron-h-experts", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
}  # fmt: skip
PRUNED = {
    "llama3": Targets(hidden_size=16, ffn_hidden_size=24, num_query_groups=1, num_layers=1),
    "qwen3": Targets(hidden_size=24, num_attention_heads=2),
    "phi3": Targets(hidden_size=24, ffn_hidden_size=32, num_layers=1),
    "qwen3-experts": Targets(hidden_size=24, num_experts=3, moe_ffn_hidden_size=16),
    "mamba2": Targets(hidden_size=16, mamba_num_heads=4, mamba_state_dim=8, num_layers=1),
    "nemotron-h": Targets(hidden_size=24, mamba_head_dim=4, num_sublayers=3),
    "nemotron-h-experts": Targets(num_experts=3, moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=16),
}


def prune(source: Path, destination: Path, targets: Targets) -> None:
    arch = layout.architecture(layout.find(source).path)
    apply(make_plan(random_scores(arch), arch, targets), source, destination)


def logits_of(folder: str, names: list[str], tp: int, pp: int) -> dict[str, Tensor]:
    """Logits of Megatron's models, whole, on the ranks of the last pipeline stage."""
    from megatron_ext.checkpoint.resume import architecture_on_disk
    from megatron_ext.conversion.megatron_logits import JOB
    from megatron_ext.training.command_line import parse_command_line

    paths = {name: Path(folder) / f"{name}-megatron" for name in names}
    flags = ["--load", str(paths[names[0]]), "--seq-length", str(SEQUENCE), "--global-batch-size", "1"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1"]
    flags += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    started = parse_command_line(JOB, flags)
    from megatron_ext.training.forward import load_model, load_other

    found = {}
    for name, path in paths.items():
        if name == names[0]:
            (model,) = load_model(started)
        else:
            _, (model,) = load_other(started, architecture_on_disk(path), path)
        logits = through_the_stages(model, dist.get_rank(), pp)
        if logits is not None and tp > 1:
            parts = [torch.empty_like(logits) for _ in range(tp)]
            dist.all_gather(parts, logits.contiguous())
            logits = torch.cat(parts, dim=-1)
        if logits is not None:
            found[name] = logits
    return found


@torch.no_grad()
def through_the_stages(model: Any, rank: int, pp: int) -> Tensor | None:
    from megatron.core.utils import unwrap_model

    positions = torch.arange(SEQUENCE)[None].expand(2, -1)
    if pp > 1 and rank == 1:
        hidden = torch.empty(SEQUENCE, 2, 32)
        dist.recv(hidden, 0)
        inner: Any = unwrap_model(model)
        inner.set_input_tensor(hidden)
    output = model(tokens(), positions, None)
    if pp > 1 and rank == 0:
        dist.send(output.contiguous(), 1)
        return None
    return output


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["alone", "tp2", "pp2"])
def test_logits_are_those_of_transformers(models: tuple[Path, dict[str, Tensor]], tp: int, pp: int) -> None:
    path, expected = models
    # Experts need sequence parallelism under tensor parallel sizes, which is tested with them.
    names = [*expected] if tp * pp == 1 else [name for name in MODELS if tp == 1 or "experts" not in name]
    found = run_ranks(logits_of, tp * pp, str(path), names, tp, pp)[-1]
    for name in names:
        difference = float((found[name] - expected[name]).abs().max())
        print(f"{name}: {difference:.1e} of {float(expected[name].abs().max()):.1f}")
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5, msg=f"{name}: {difference:.1e}")


def test_the_formulas_say_what_transformers_says(models: tuple[Path, dict[str, Tensor]]) -> None:
    """But for what they do not have: squared ReLU and biases everywhere."""
    path, expected = models
    checked = []
    for name in (*MODELS, *ODD):
        reader = CheckpointReader(path / f"{name}-megatron")
        arch = layout.architecture(reader.step.path)
        try:
            found, _ = reference.forward(arch, {key: reader.read(key) for key in reader.shapes}, tokens())
        except ConfigError:
            continue
        torch.testing.assert_close(found.float(), expected[name], rtol=0, atol=5e-5, msg=name)
        checked.append(name)
    assert {name for name in MODELS if "nemotron" not in name and name != "llama-biases"} <= set(checked)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_models_generate(models: tuple[Path, dict[str, Tensor]], name: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(models[0] / f"{name}-pruned")
    made = model.generate(tokens()[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.shape == (2, 9)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_identical(models: tuple[Path, dict[str, Tensor]], tmp_path: Path, name: str) -> None:
    path, _ = models
    to_hf(path / f"{name}-megatron", tmp_path / "back", shard_bytes=30_000)
    assert (tmp_path / "back" / "config.json").read_bytes() == (path / name / "config.json").read_bytes()
    old, new = Shards(path / name), Shards(tmp_path / "back")
    assert old.entries.keys() == new.entries.keys()
    for key, entry in old.entries.items():
        assert (entry.shape, entry.dtype) == (new.entries[key].shape, new.entries[key].dtype)
        left, right = torch.empty(entry.shape), torch.empty(entry.shape)
        old.fill(key, left)
        new.fill(key, right)
        assert torch.equal(left, right), key


def convert_together(source: str, megatron: str, hf: str) -> str:
    to_megatron(source, megatron)
    to_hf(megatron, hf, shard_bytes=30_000)
    return "done"


def test_processes_write_what_one_does(models: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, _ = models
    name = "nemotron-h-experts"
    to_hf(path / f"{name}-megatron", tmp_path / "alone", shard_bytes=30_000)
    run_ranks(convert_together, 2, str(path / name), str(tmp_path / "megatron"), str(tmp_path / "hf"))
    for file in (tmp_path / "alone").iterdir():
        if file.name != "README.md":  # which names the directory
            assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes(), file.name
    assert all((tmp_path / "megatron" / "release" / f"__{rank}_0.distcp").stat().st_size > 50_000 for rank in (0, 1))
