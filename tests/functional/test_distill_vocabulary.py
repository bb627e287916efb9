"""Teacher and student of one tokenizer, differently padded: the loss is that over its tokens, as in transformers."""

import numpy as np
import pytest
import torch
from hf_models import make
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor
from workspace import TRAIN, Workspace

from megatron_ext.checkpoint.huggingface.convert import to_megatron
from tests.functional.test_distill import TP

TOKENS, LENGTH, SEQUENCES = 512, 64, 8
ROWS = {"wide-teacher": 704, "narrow-student": 576}
LAYOUTS = {
    "alone": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "teacher tp2": (2, [TP, "2"]),
}


@pytest.fixture(scope="module")
def document(workspace: Workspace) -> Tensor:
    """As many tokens as one batch reads, which is the whole data set; and the two models, converted."""
    tokens = torch.randint(TOKENS, (SEQUENCES * LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    prefix = str(workspace.path / "batch")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    text = (workspace.path / "data" / "tokenizer" / "tokenizer.json").read_text()
    for name, rows in ROWS.items():
        make("qwen2", workspace.path / f"hf-{name}", vocab_size=rows, tie_word_embeddings=name == "narrow-student")
        (workspace.path / f"hf-{name}" / "tokenizer.json").write_text(text)
        to_megatron(workspace.path / f"hf-{name}", workspace.path / name)
    return tokens


@pytest.fixture(scope="module")
def expected(workspace: Workspace, document: Tensor) -> dict[str, float]:
    """The divergence in nats per token and the norm of its gradient, in float64."""
    from transformers import Qwen2ForCausalLM

    windows = torch.stack([document[i * LENGTH : (i + 1) * LENGTH] for i in range(SEQUENCES)])
    models = [Qwen2ForCausalLM.from_pretrained(workspace.path / f"hf-{name}", dtype=torch.float64) for name in ROWS]
    with torch.no_grad():
        log_q = models[0](windows).logits[..., :TOKENS].log_softmax(-1)
    log_p = models[1](windows).logits[..., :TOKENS].log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    loss.backward()
    gradients = [p.grad for p in models[1].parameters() if p.grad is not None]
    return {"kd_loss": loss.item(), "grad_norm": torch.stack([g.norm() for g in gradients]).norm().item()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_tokens_are_compared(
    workspace: Workspace, document: Tensor, expected: dict[str, float], name: str
) -> None:
    ranks, flags = LAYOUTS[name]
    flags = ["--distill-teacher", "wide-teacher", "--pretrained-checkpoint", "narrow-student", *flags, *TRAIN]
    data = [
        "--data-path", "batch", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "data/tokenizer",
        "--seq-length", str(LENGTH), "--micro-batch-size", "2", "--global-batch-size", str(SEQUENCES),
        "--split", "100,0,0", "--eval-iters", "0", "--train-iters", "1",
    ]  # fmt: skip
    save = f"narrow by wide, {name}"
    done = workspace.run("distill_gpt.py", *flags, *data, "--save", save, ranks=ranks)
    assert f"learning from --distill-teacher {workspace.path / 'wide-teacher' / 'release'}" in done.stdout
    (step,) = workspace.metrics(save)
    for key, value in expected.items():
        assert step[key] == pytest.approx(value, rel=1e-5), key
