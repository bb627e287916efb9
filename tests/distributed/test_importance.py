"""The model and the scores against formulas in float64 that know nothing of Megatron, hooks or ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runner import run_ranks
from reference_model import forward
from torch import Tensor

from megatron_ext.checkpoint.reader import Reader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models import axes
from megatron_ext.models.config import Architecture
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.importance import WidthMetric

ARCH = Architecture(
    pattern="M-*-MM-", hidden_size=32, vocab_size=64, max_position_embeddings=32, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=8,
    mamba_num_groups=2,
)  # fmt: skip
SEQUENCE, SAMPLES = 24, 4


def random_checkpoint(path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    with writing(path, ARCH) as writer:
        for key, shape in axes.tensors(ARCH).items():
            noise = torch.randn(shape, generator=generator)
            writer.write(key, noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * noise)


def tokens() -> Tensor:
    return torch.randint(ARCH.vocab_size, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(8))


METRICS = [WidthMetric(batch=b, sequence=q) for b, q in (("l2", "mean"), ("mean", "l2"), ("var", "var"))]
METRICS.append(WidthMetric("wanda"))
SETS = [(i,) for i in range(len(ARCH.pattern))] + [(0, 1), (2, 3), (5, 6), (1, 4, 6), (3, 4)]


def measured(checkpoint: str, save: str) -> dict[str, Any]:
    """What hooks and ablation find in Megatron's model, in micro-batches of two sequences."""
    from megatron_ext.training.launch import launch
    from megatron_ext.training.prune import JOB

    flags = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    started = launch(JOB, [*flags, "--micro-batch-size", "2"])
    from megatron.core.utils import unwrap_model

    from megatron_ext.pruning.ablation import Ablation
    from megatron_ext.pruning.depth import Influence
    from megatron_ext.pruning.importance import Importance
    from megatron_ext.training.evaluate import load_model

    (model,) = unwrap_model(load_model(started))
    positions = torch.arange(SEQUENCE)[None]

    @torch.no_grad()
    def run(labels: Tensor) -> float:
        pairs = zip(tokens().split(2), labels.split(2), strict=True)
        losses = [model(micro, positions, None, labels=label).double().mean() for micro, label in pairs]
        return float(torch.stack(losses).mean())

    widths = [Importance([model], ARCH, metric) for metric in METRICS]
    influence = Influence([model], ARCH)
    with torch.no_grad():
        logits = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    found: dict[str, Any] = {"logits": logits, "widths": [width.gather() for width in widths]}
    found["depth"] = influence.gather()
    for hooks in (*widths, influence):
        hooks.remove()

    each = SAMPLES * SEQUENCE * ARCH.hidden_size * 4
    for budget in (100 * each, 5 * each, 0):
        ablation = Ablation(
            [model], ARCH, lambda: run(targets()), tokens=SAMPLES * SEQUENCE, memory=budget,
            run_task=lambda: run(questions()),
        )  # fmt: skip
        outcomes = {units: ablation.without(units) for units in ((), *SETS)}
        before = dict(ablation.calls)
        ablation.without((5,))  # remembered
        ablation.without((5, 3, 6))
        steps = {i: ablation.calls[i] - before[i] for i in before}
        found[f"ablation {budget // each}"] = (ablation.stride, outcomes, steps)
        ablation.remove()
    with torch.no_grad():
        after = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    found["untouched"] = torch.equal(after, logits)
    return found


def targets() -> Tensor:
    return tokens().roll(-1, dims=1)


def questions() -> Tensor:
    """Labels of a task: two tokens to be answered in each of the first three samples, none in the last."""
    labels = torch.full((SAMPLES, SEQUENCE), -1)
    # What the whole model says, so that some are right; the second sample's is wrong.
    labels[0, 3:5], labels[1, 7:9], labels[2, 20:22] = (torch.tensor(a) for a in ([21, 15], [23, 8], [27, 21]))
    return labels


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("importance")
    random_checkpoint(path / "model")
    (found,) = run_ranks(measured, 1, str(path / "model"), str(path / "run"))
    reader = Reader(path / "model")
    return found, {key: reader.read(key) for key in reader.shapes}


@pytest.fixture(scope="module")
def reference(results) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return forward(ARCH, results[1], tokens())


def test_the_model_is_its_formula(results, reference) -> None:
    torch.testing.assert_close(results[0]["logits"].double(), reference[0], rtol=1e-4, atol=1e-4)


AGGREGATIONS = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, correction=0),
}


@pytest.mark.parametrize("place", range(3))
def test_width_scores_are_their_formulas(results, reference, place: int) -> None:
    """First over the sequence, then over the samples: the other way round gives other numbers."""
    metric, scores, layers = METRICS[place], results[0]["widths"][place], reference[1]

    def aggregate(activation: Tensor) -> Tensor:
        return AGGREGATIONS[metric.batch](AGGREGATIONS[metric.sequence](activation, 1), 0)

    expected = {names.HIDDEN: sum(aggregate(layer["norm"]) for layer in layers)}
    for i, (kind, layer) in enumerate(zip(ARCH.pattern, layers, strict=True)):
        if kind == "-":
            expected[names.ffn(i)] = aggregate(layer["inner"])
        elif kind == "*":
            expected[names.query_head(i)] = aggregate(layer["inner"].square().sum(-1).sqrt())
        else:
            expected[names.mamba(i)] = aggregate(layer["inner"])
            expected[names.state(i)] = aggregate(layer["B"]) * aggregate(layer["C"])
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-4, atol=0)


def test_wanda_is_weight_times_activation(results, reference) -> None:
    scores, weights, layers = results[0]["widths"][3], results[1], reference[1]

    def norm(activation: Tensor) -> Tensor:
        return activation.square().sum((0, 1)).sqrt()

    hidden = torch.zeros(ARCH.hidden_size, dtype=torch.float64)
    for i, (kind, layer) in enumerate(zip(ARCH.pattern, layers, strict=True)):
        w = {k.split(".", 3)[3]: v.double() for k, v in weights.items() if k.startswith(f"decoder.layers.{i}.")}
        if kind == "-":
            rows = w["mlp.linear_fc1.weight"]
            columns = w["mlp.linear_fc2.weight"].square().sum(0).sqrt()
            torch.testing.assert_close(scores[names.ffn(i)].double(), norm(layer["inner"]) * columns, rtol=1e-4, atol=0)
        elif kind == "*":
            rows = w["self_attention.linear_qkv.weight"]
            columns = w["self_attention.linear_proj.weight"].square().sum(0).sqrt()
            per_head = (norm(layer["inner"]).flatten() * columns).view(ARCH.num_attention_heads, -1).norm(dim=1)
            torch.testing.assert_close(scores[names.query_head(i)].double(), per_head, rtol=1e-4, atol=0)
        else:
            rows = torch.cat([w[f"mixer.in_proj.weight.{part}"] for part in ("z", "x", "B", "C", "dt")])
            columns = w["mixer.out_proj.weight"].square().sum(0).sqrt()
            inner = (norm(layer["out"]) * columns).view(ARCH.mamba_num_heads, -1)
            torch.testing.assert_close(scores[names.mamba(i)].double(), inner, rtol=1e-4, atol=0)
        hidden += norm(layer["norm"]) * rows.square().sum(0).sqrt()
    torch.testing.assert_close(scores[names.HIDDEN].double(), hidden, rtol=1e-4, atol=0)


def test_static_depth_scores_are_their_formulas(results, reference) -> None:
    scores, layers = results[0]["depth"], reference[1]

    def change(x: Tensor, y: Tensor) -> list[Tensor]:
        cosine = (x * y).sum(-1) / (x.square().sum(-1).sqrt() * y.square().sum(-1).sqrt())
        norms = [(y - x).abs().sum(-1) / x.abs().sum(-1), (y - x).square().sum(-1).sqrt() / x.square().sum(-1).sqrt()]
        return [1 - cosine.mean(), *(norm.mean() for norm in norms)]

    units = [change(layer["input"], layer["output"]) for layer in layers]
    blocks = [change(layers[b[0]]["input"], layers[b[-1]]["output"]) for b in ARCH.layers.blocks]
    for place, metric in enumerate(("block_influence", "relative_l1", "relative_l2")):
        for expected, whole in ((units, False), (blocks, True)):
            value = torch.stack([changes[place] for changes in expected])
            torch.testing.assert_close(scores[names.depth(metric, blocks=whole)].double(), value, rtol=1e-4, atol=1e-6)


def test_leaving_out_is_its_formula(results, reference) -> None:
    """Loss, logit distances and the task, for single sub-layers, blocks and other sets, on any memory budget."""
    found, weights = results
    whole = reference[0]
    asked = questions()
    answers = asked[:3] >= 0
    strides = []
    for budget in (100, 5, 0):
        stride, outcomes, _ = found[f"ablation {budget}"]
        strides.append(stride)
        for units, outcome in outcomes.items():
            logits, _ = forward(ARCH, weights, tokens(), skip=units)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets().flatten())
            assert outcome.loss == pytest.approx(float(loss), rel=1e-5)
            difference = (logits - whole).square().sum(-1)
            assert outcome.logit_mse == pytest.approx(float(difference.sum() / whole.square().sum()), rel=1e-4)
            assert outcome.logit_distance == pytest.approx(float(difference.sqrt().mean()), rel=1e-4)
            right = ((logits.argmax(-1) == asked)[:3] | ~answers).all(1)
            assert outcome.task == pytest.approx(float(right.double().mean()))
    assert strides == [1, 2, len(ARCH.pattern) + 1]
    assert 0 < found["ablation 100"][1][()].task < 1


def test_the_untouched_prefix_is_not_run_again(results) -> None:
    found, _ = results
    calls = {budget: found[f"ablation {budget}"][2] for budget in (100, 5, 0)}
    per_layer = [[calls[budget][i] for i in range(7)] for budget in (100, 5, 0)]
    # Without 3, 5, 6, in two micro-batches. The task begins at the embedding, the loss where the budget allows.
    assert per_layer == [[2, 2, 2, 0, 4, 0, 0], [2, 2, 4, 0, 4, 0, 0], [4, 4, 4, 0, 4, 0, 0]]
    assert found["untouched"]
