"""What is measured of experts is its formula, in float64 and from the checkpoint's tensors alone, on any layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from random_models import random_weights
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.reference import forward
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.importance import WidthMetric

ARCH = Architecture(
    pattern="*E-E", hidden_size=32, padded_vocab_size=64, max_position_embeddings=32, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=4, num_experts=6, moe_ffn_hidden_size=12,
    moe_shared_expert_intermediate_size=16, moe_router_topk=2, moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True, moe_router_topk_scaling_factor=1.5,
)  # fmt: skip
SEQUENCE, SAMPLES = 24, 4
METRICS = [WidthMetric(), WidthMetric(batch="mean", sequence="l2"), WidthMetric(batch="var", sequence="var")]
METRICS.append(WidthMetric("wanda"))
MIXTURES = ARCH.layers.indices("E")
SOFTMAX = {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}
ROUTERS: list[dict[str, Any]] = [
    {}, {"moe_router_topk": 1}, {"moe_router_topk": 3, "moe_router_enable_expert_bias": False}, SOFTMAX,
    SOFTMAX | {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": None},
]  # fmt: skip
LAYOUTS = {
    "one": (1, []),
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
    "ep2-alltoall": (2, ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"]),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "tp2-ep2": (2, [
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2",
        "--expert-tensor-parallel-size", "1",
    ]),
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    """Random ones, but for an expert bias that keeps every token from the last expert."""
    values = random_weights(ARCH)
    for i in MIXTURES:
        values[f"decoder.layers.{i}.mlp.router.expert_bias"] = torch.tensor(
            [0.1, 0, 0, 0.2, 0, -9], dtype=torch.float64
        )
    return values


def tokens() -> Tensor:
    return torch.randint(ARCH.padded_vocab_size, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(8))


def measured(checkpoint: str, save: str, layout: list[str]) -> tuple[list[dict[str, Tensor] | None], list[Tensor]]:
    """The scores by each metric, and on one rank the logits with each router, of this rank's share of the samples."""
    from megatron_ext.pruning.job import JOB
    from megatron_ext.training.command_line import parse_command_line

    flags = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    started = parse_command_line(JOB, [*flags, "--micro-batch-size", "1", *layout])
    from megatron.core.utils import unwrap_model

    from megatron_ext.pruning.importance import Importance
    from megatron_ext.training.forward import load_model

    (model,) = unwrap_model(load_model(started))
    widths = [Importance([model], ARCH, metric) for metric in METRICS]
    group = model.pg_collection.dp
    with torch.no_grad():
        for micro in tokens()[group.rank() :: group.size()].split(2 // group.size()):
            model(micro, torch.arange(SEQUENCE)[None], None)
    scores = [width.gather() for width in widths]
    logits = []
    for router in ROUTERS if dist.get_world_size() == 1 else []:
        variant = replace(ARCH, **router)
        for i in MIXTURES:
            module = model.decoder.layers[i].mlp.router
            module.topk, module.score_function = variant.moe_router_topk, variant.moe_router_score_function
            if not variant.moe_router_enable_expert_bias:
                module.expert_bias = None
            module.config.moe_router_pre_softmax = variant.moe_router_pre_softmax
            module.config.moe_router_topk_scaling_factor = variant.moe_router_topk_scaling_factor
        with torch.no_grad():
            logits.append(model(tokens(), torch.arange(SEQUENCE)[None], None))
    return scores, logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "model"
    with writing(path, ARCH) as writer:
        for key, tensor in weights().items():
            writer.write(key, tensor.float())
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[dict[str, Tensor]]:
    """By the formulas."""
    reader = CheckpointReader(checkpoint)
    values = {key: reader.read(key).double() for key in reader.shapes}
    _, layers = forward(ARCH, values, tokens())
    for i in MIXTURES:
        used = (layers[i]["probability"] > 0).any(dim=1).any(dim=0)
        assert used.tolist() == [True] * 5 + [False]
    return [formulas(metric, values, layers) for metric in METRICS]


AGGREGATIONS = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, correction=0),
}


def formulas(metric: WidthMetric, w: dict[str, Tensor], layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    wanda = metric.kind == "wanda"
    batch, sequence = ("l2", "l2") if wanda else (metric.batch, metric.sequence)

    def dense(activation: Tensor) -> Tensor:
        return AGGREGATIONS[batch](AGGREGATIONS[sequence](activation, 1), 0)

    result = {}
    for i in MIXTURES:
        layer, prefix = layers[i], f"decoder.layers.{i}.mlp."
        fc1, fc2 = (w[f"{prefix}experts.experts.linear_fc{n}.weight"] for n in (1, 2))
        probability = layer["probability"].flatten(0, 1)  # tokens, experts
        outputs, neurons = layer["outputs"].flatten(0, 1), layer["neurons"].flatten(0, 1)
        experts, inside = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 12, dtype=torch.float64)
        for expert in range(6):
            sent = probability[:, expert] > 0
            if sent.any():
                g = probability[sent, expert]
                experts[expert] = (g * outputs[sent, expert].square().sum(-1).sqrt()).mean()
                inside[expert] = AGGREGATIONS[sequence](g[:, None] * neurons[sent, expert], 0)
            if wanda:
                inside[expert] *= fc2[expert].square().sum(0).sqrt()
        shared = dense(layer["shared"])
        hidden = dense(layer["norm"])
        if wanda:
            shared *= w[f"{prefix}shared_experts.linear_fc2.weight"].square().sum(0).sqrt()
            rows = [w[f"{prefix}router.weight"], fc1.flatten(0, 1), w[f"{prefix}shared_experts.linear_fc1.weight"]]
            hidden *= torch.cat(rows).square().sum(0).sqrt()
        result |= {names.expert(i): experts, names.expert_ffn(i): inside, names.shared_ffn(i): shared}
        result[f"hidden.{i}"] = hidden
    for i, first in ((0, "self_attention.linear_qkv"), (2, "mlp.linear_fc1")):
        hidden = dense(layers[i]["norm"])
        result[f"hidden.{i}"] = hidden
        if wanda:
            result[f"hidden.{i}"] = hidden * w[f"decoder.layers.{i}.{first}.weight"].square().sum(0).sqrt()
    return result | {names.HIDDEN: sum((result.pop(f"hidden.{i}") for i in range(4)), torch.zeros(()))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_of_experts_are_their_formulas(
    checkpoint: Path, expected: list[dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    ranks, layout = LAYOUTS[name]
    found: list[Any] = run_ranks(measured, ranks, str(checkpoint), str(tmp_path / "run"), layout)
    for scores, formula in zip(found[0][0], expected, strict=True):
        for key, value in formula.items():
            torch.testing.assert_close(scores[key].double(), value, rtol=1e-4, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    assert all(scores is None for other, _ in found[1:] for scores in other)
    assert len(found[0][1]) == (len(ROUTERS) if ranks == 1 else 0)
    reader = CheckpointReader(checkpoint)
    for router, logits in zip(ROUTERS, found[0][1], strict=False):
        variant = replace(ARCH, **router)
        values = {key: reader.read(key) for key in axes.keys(variant)}
        torch.testing.assert_close(logits.double(), forward(variant, values, tokens())[0], rtol=1e-4, atol=1e-4)
