"""What is replaced is put back, every name of it. Each test is a process of its own: the replacing is process-wide."""

import json
import subprocess
import sys

import pytest
from workspace import HAS_GPU

REVERSIBILITY = """
import importlib, json, sys
import torch
import torch.distributed, torch.cuda.nvtx, torch.utils._device

# What install() alters, as far as it may be imported before (the hybrid specs may not).
for name in (
    "megatron.core.extensions.transformer_engine", "megatron.core.extensions.transformer_engine_spec_provider",
    "megatron.core.optimizer.distrib_optimizer", "megatron.core.datasets.utils", "megatron.core.utils",
    "megatron.core.models.gpt.gpt_layer_specs",
):
    importlib.import_module(name)

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext import platform
from megatron_ext.models.bootstrap import prepare
from megatron_ext.platform import replacements


def snapshot():
    owners = {name: module for name, module in sys.modules.items() if name.startswith(("torch", "megatron.core"))}
    owners |= {"Tensor": torch.Tensor, "Module": torch.nn.Module, "DistributedOptimizer": DistributedOptimizer}
    return {name: dict(vars(owner)) for name, owner in owners.items()}


before, modules = snapshot(), dict(sys.modules)
prepare()
entries = list(replacements.table())
prepare()
again = len(list(replacements.table()))
during = snapshot()
platform.uninstall()
after = snapshot()

missing = object()
changed = [f"{o}.{n}" for o in before for n in during[o] if during[o][n] is not before[o].get(n, missing)]
kept = [f"{o}.{n}" for o in before for n in before[o] if n not in after[o] or after[o][n] is not before[o][n]]
values = {id(entry.value) for entry in entries if callable(entry.value)}
new = [(o, n) for o in after for n in after[o] if n not in before.get(o, {})]
left = [f"{o}.{n}" for o, n in new if id(after[o][n]) in values]
stubs = [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d") and name not in modules]
print(json.dumps({
    "entries": [str(entry) for entry in entries], "again": again, "changed": changed, "kept": kept, "left": left,
    "stubs": stubs, "installed": platform.installed(), "available": torch.cuda.is_available(),
}))
"""

NAMES = """
import json, os
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
from megatron_ext.models.bootstrap import prepare
prepare()
import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, kv_channels=8,
    mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=8, mamba_num_groups=2, normalization="RMSNorm",
    add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
    hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, layernorm_zero_centered_gamma=True,
    num_moe_experts=2, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12,
)
model = HybridModel(
    config, hybrid_stack_spec, vocab_size=64, max_sequence_length=16, hybrid_layer_pattern="M*-E",
    position_embedding_type="none", share_embeddings_and_output_weights=False,
)

# One linear with its norm, against the formula.
linear = model.decoder.layers[2].mlp.linear_fc1
with torch.no_grad():
    linear.layer_norm_weight.uniform_(-0.5, 0.5)
x = torch.randn(5, 2, 32)
y, _ = linear(x)
normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.layernorm_epsilon) * (1 + linear.layer_norm_weight)
expected = torch.einsum("sbh,fh->sbf", normed, linear.weight)
logits = model(torch.arange(16)[None], torch.arange(16)[None], None)
print(json.dumps({
    "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
    "error": (y - expected).abs().max().item(), "finite": bool(logits.isfinite().all()), "logits": list(logits.shape),
}))
"""


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(HAS_GPU, reason="on a GPU next to nothing is replaced")
def test_every_name_comes_back():
    seen = run(REVERSIBILITY)
    assert len(seen["entries"]) > 50
    assert seen["again"] == len(seen["entries"]), "preparing twice replaces twice"
    for name in (
        "torch.cuda.is_available", "torch.zeros", "Tensor.to", "Tensor.is_cuda", "Module.cuda", "torch.Generator",
        "torch.distributed.all_reduce", "megatron.core.extensions.transformer_engine.TENorm",
        "megatron.core.optimizer.Adam", "megatron.core.datasets.utils.compile_helpers",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ):  # fmt: skip
        assert name in seen["changed"]
    assert seen["kept"] == []
    assert seen["left"] == []
    assert seen["stubs"] == []
    assert not seen["installed"]
    assert not seen["available"]
    # Each replacement says what it stands in for, and when: "owner.name: what (when)".
    assert all(entry.endswith(")") and ": " in entry for entry in seen["entries"])


@pytest.mark.skipif(HAS_GPU, reason="checks the modules that stand in where there is no GPU")
def test_the_stock_spec_builds_with_transformer_engines_parameter_names():
    seen = run(NAMES)
    assert seen["parameters"] == {
        "embedding.word_embeddings.weight": [64, 32],
        "decoder.layers.0.mixer.dt_bias": [4],
        "decoder.layers.0.mixer.A_log": [4],
        "decoder.layers.0.mixer.D": [4],
        "decoder.layers.0.mixer.in_proj.weight": [64 + 64 + 16 + 16 + 4, 32],
        "decoder.layers.0.mixer.in_proj.layer_norm_weight": [32],
        "decoder.layers.0.mixer.conv1d_weight": [64 + 16 + 16, 1, 4],
        "decoder.layers.0.mixer.conv1d_bias": [64 + 16 + 16],
        "decoder.layers.0.mixer.norm.weight": [64],
        "decoder.layers.0.mixer.out_proj.weight": [32, 64],
        "decoder.layers.1.self_attention.linear_proj.weight": [32, 32],
        "decoder.layers.1.self_attention.linear_qkv.weight": [32 + 16 + 16, 32],
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": [32],
        "decoder.layers.2.mlp.linear_fc1.weight": [96, 32],
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight": [32],
        "decoder.layers.2.mlp.linear_fc2.weight": [32, 48],
        "decoder.layers.3.pre_mlp_layernorm.weight": [32],
        "decoder.layers.3.mlp.router.weight": [2, 32],
        "decoder.layers.3.mlp.experts.linear_fc1.weight0": [40, 32],
        "decoder.layers.3.mlp.experts.linear_fc1.weight1": [40, 32],
        "decoder.layers.3.mlp.experts.linear_fc2.weight0": [32, 20],
        "decoder.layers.3.mlp.experts.linear_fc2.weight1": [32, 20],
        "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": [24, 32],
        "decoder.layers.3.mlp.shared_experts.linear_fc2.weight": [32, 12],
        "decoder.final_norm.weight": [32],
        "output_layer.weight": [64, 32],
    }
    assert seen["error"] < 1e-5
    assert seen["finite"]
    assert seen["logits"] == [1, 16, 64]
