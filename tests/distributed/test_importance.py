"""The model and the scores against formulas in float64 that know nothing of Megatron, hooks or ranks."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
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
    pattern="M-*-MM-", hidden_size=32, padded_vocab_size=64, max_position_embeddings=32, ffn_hidden_size=48,
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
    return torch.randint(ARCH.padded_vocab_size, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(8))


METRICS = [WidthMetric(batch=b, sequence=q) for b, q in (("l2", "mean"), ("mean", "l2"), ("var", "var"))]
METRICS.append(WidthMetric("wanda"))
SETS = [(i,) for i in range(len(ARCH.pattern))] + [(0, 1), (2, 3), (5, 6), (1, 4, 6), (3, 4)]


def measured(checkpoint: str, save: str) -> dict[str, Any]:
    """What hooks and ablation find in Megatron's model, in micro-batches of two sequences."""
    from megatron_ext.pruning.job import JOB
    from megatron_ext.training.command_line import parse_command_line

    flags = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    started = parse_command_line(JOB, [*flags, "--micro-batch-size", "2"])
    from megatron.core.utils import unwrap_model

    from megatron_ext.pruning.ablation import Ablation, Passes
    from megatron_ext.pruning.depth import BlockInfluence
    from megatron_ext.pruning.importance import Importance
    from megatron_ext.pruning.left_out import LeftOut
    from megatron_ext.training.forward import load_model

    (model,) = unwrap_model(load_model(started))
    positions = torch.arange(SEQUENCE)[None]

    @torch.no_grad()
    def run(begin: int, end: int) -> tuple[float, float]:
        pairs = zip(tokens().split(2)[begin:end], targets().split(2)[begin:end], strict=True)
        losses = [model(micro, positions, None, labels=label).double() for micro, label in pairs]
        return float(sum(loss.sum() for loss in losses)), float(sum(loss.numel() for loss in losses))

    widths = [Importance([model], ARCH, metric) for metric in METRICS]
    influence = BlockInfluence([model], ARCH)
    with torch.no_grad():
        logits = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    found: dict[str, Any] = {"logits": logits, "widths": [width.gather() for width in widths]}
    found["depth"] = influence.gather()
    for hooks in (*widths, influence):
        hooks.remove()

    state = 2 * SEQUENCE * ARCH.hidden_size * 4  # of a micro-batch
    passes = Passes(run, SAMPLES // 2, 2 * SEQUENCE)
    for compared in (True, False):
        for room in (100, 8, 1, 0):
            ablation = Ablation([model], ARCH, passes, memory=room * state, logits=compared)
            outcomes = {units: ablation.outcome(units) for units in ((), *SETS)}
            before = dict(ablation.calls)
            ablation.outcome((5,))  # remembered
            ablation.outcome((5, 3, 6))
            steps = [ablation.calls[i] - before[i] for i in before]
            kept = len(ablation._inputs) + len(ablation._final)
            found[f"ablation {compared} {room}"] = (ablation.stride, ablation.at_a_time, outcomes, steps, kept)
            ablation.remove()
    left_out = LeftOut([model], ARCH)
    with left_out.without((1, 4)), torch.no_grad():
        found["left out"] = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    left_out.remove()
    with torch.no_grad():
        after = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    found["untouched"] = torch.equal(after, logits)
    return found


def targets() -> Tensor:
    return tokens().roll(-1, dims=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("importance")
    random_checkpoint(path / "model")
    (found,) = run_ranks(measured, 1, str(path / "model"), str(path / "run"))
    reader = CheckpointReader(path / "model")
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
    tolerance = 1e-3 if "var" in (metric.batch, metric.sequence) else 1e-4  # of nearly equal values
    for name, value in expected.items():
        torch.testing.assert_close(scores[name].double(), value, rtol=tolerance, atol=0)


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


ROOMS = (100, 8, 1, 0)


def test_leaving_out_is_its_formula(results, reference) -> None:
    """Losses and logit distances, for single sub-layers, blocks and other sets, on any memory budget."""
    found, weights = results
    whole = reference[0]
    for units in ((), *SETS):
        logits, _ = forward(ARCH, weights, tokens(), skip=units)
        loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets().flatten()))
        difference = (logits - whole).square().sum(-1)
        for compared, room in product((True, False), ROOMS):
            outcome = found[f"ablation {compared} {room}"][2][units]
            assert outcome.loss == pytest.approx(loss, rel=1e-5)
            mse, distance = difference.sum() / whole.square().sum(), difference.sqrt().mean()
            assert outcome.logit_mse == pytest.approx(compared * float(mse), rel=1e-4)
            assert outcome.logit_distance == pytest.approx(compared * float(distance), rel=1e-4)
    expected, _ = forward(ARCH, weights, tokens(), skip=(1, 4))
    torch.testing.assert_close(found["left out"].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_untouched_prefix_is_not_run_again_where_there_is_room(results) -> None:
    """Without 3, 5 and 6, in two micro-batches; and no more states of a micro-batch are kept than there is room for."""
    found, _ = results
    none = len(ARCH.pattern)
    expected = {
        # stride, micro-batches at a time, layers run for the set, states kept at the end
        (True, 100): (1, 2, [0, 0, 0, 0, 2, 0, 0], 14), (True, 8): (2, 2, [0, 0, 2, 0, 2, 0, 0], 8),
        # The whole model again, a micro-batch at a time.
        (True, 1): (none, 1, [4, 4, 4, 2, 4, 2, 2], 1), (True, 0): (none, 1, [4, 4, 4, 2, 4, 2, 2], 1),
        (False, 100): (1, 2, [0, 0, 0, 0, 2, 0, 0], 12), (False, 8): (2, 2, [0, 0, 2, 0, 2, 0, 0], 6),
        (False, 1): (none, 2, [2, 2, 2, 0, 2, 0, 0], 0), (False, 0): (none, 2, [2, 2, 2, 0, 2, 0, 0], 0),
    }  # fmt: skip
    for (logits, room), (stride, at_a_time, steps, kept) in expected.items():
        got = found[f"ablation {logits} {room}"]
        assert (got[0], got[1], got[3], got[4]) == (stride, at_a_time, steps, kept)
    assert found["untouched"]
