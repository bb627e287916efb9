"""The model and the scores against formulas in float64 that know nothing of Megatron, hooks or ranks."""

from pathlib import Path

import pytest
import torch
from distributed.runner import run_ranks
from reference_model import forward
from torch import Tensor

from megatron_ext.checkpoint.stream import Reader, writing
from megatron_ext.models import axes
from megatron_ext.models.config import Architecture
from megatron_ext.pruning import scores as names

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


def measured(checkpoint: str, save: str) -> tuple[dict[str, Tensor], Tensor]:
    """The scores and the logits of Megatron's model, in micro-batches of two sequences."""
    from megatron_ext.training.launch import launch
    from megatron_ext.training.prune import JOB

    flags = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    started = launch(JOB, [*flags, "--micro-batch-size", "2"])
    from megatron.core.utils import unwrap_model

    from megatron_ext.pruning.importance import Importance
    from megatron_ext.training.evaluate import load_model

    (model,) = unwrap_model(load_model(started))
    importance = Importance([model], ARCH)
    with torch.no_grad():
        positions = torch.arange(SEQUENCE)[None]
        logits = torch.cat([model(micro, positions, None) for micro in tokens().split(2)])
    scores = importance.gather()
    assert scores is not None
    return scores, logits


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Tensor], Tensor, Tensor, list[dict[str, Tensor]]]:
    path = tmp_path_factory.mktemp("importance")
    random_checkpoint(path / "model")
    ((scores, logits),) = run_ranks(measured, 1, str(path / "model"), str(path / "run"))
    reader = Reader(path / "model")
    return scores, logits, *forward(ARCH, {key: reader.read(key) for key in reader.shapes}, tokens())


def test_the_model_is_its_formula(results) -> None:
    _, logits, expected, _ = results
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def aggregate(activation: Tensor) -> Tensor:
    """(b, s, ...) to (...): the mean magnitude over the sequence, then the L2 norm over the samples."""
    return activation.abs().mean(dim=1).square().sum(dim=0).sqrt()


def test_width_scores_are_their_formulas(results) -> None:
    scores, _, _, layers = results
    expected = {names.HIDDEN: sum(aggregate(layer["norm"]) for layer in layers)}
    for i, (kind, layer) in enumerate(zip(ARCH.pattern, layers, strict=True)):
        if kind == "-":
            expected[names.ffn(i)] = aggregate(layer["inner"])
        elif kind == "*":
            expected[names.query_head(i)] = aggregate(layer["inner"].square().sum(-1).sqrt())
        else:
            expected[names.mamba(i)] = aggregate(layer["inner"])
    for name, value in expected.items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-4, atol=0)


def test_block_influence_is_its_formula(results) -> None:
    scores, _, _, layers = results

    def influence(before: Tensor, after: Tensor) -> Tensor:
        cosine = (before * after).sum(-1) / (before.square().sum(-1).sqrt() * after.square().sum(-1).sqrt())
        return 1 - cosine.mean()

    units = torch.stack([influence(layer["input"], layer["output"]) for layer in layers])
    blocks = torch.stack([influence(layers[b[0]]["input"], layers[b[-1]]["output"]) for b in ARCH.layers.blocks])
    torch.testing.assert_close(scores[names.INFLUENCE].double(), units, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores[names.BLOCK_INFLUENCE].double(), blocks, rtol=1e-4, atol=1e-6)
