"""`megatron-ext evaluate`: what transformers would measure, on every layout."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make
from workspace import Workspace

from megatron_ext.checkpoint.huggingface.convert import to_megatron

pytestmark = pytest.mark.filterwarnings("ignore")
COMMAND = str(Path(sys.executable).parent / "megatron-ext")
LAYOUTS = {
    "alone": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
}
TEXT = Path(json.__file__).read_text()[:3000]
WINDOW, STRIDE = 48, 20


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> str:
    """A hybrid with the corpus's tokenizer, as a checkpoint; its original is in `model-hf`."""
    original = workspace.path / "model-hf"
    make("nemotron-h", original, vocab_size=512)
    for file in (workspace.path / "data" / "tokenizer").iterdir():
        shutil.copyfile(file, original / file.name)
    to_megatron(original, workspace.path / "model", vocab_multiple=96)
    (workspace.path / "text.txt").write_text(TEXT)
    (workspace.path / "other.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n"}) + "\n")
    return "model"


@torch.no_grad()
def nats_by_transformers(path: Path, text: str) -> float:
    """Window by window, as transformers' own guide to perplexity does it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    total, before = 0.0, 1
    for end in [*range(WINDOW + 1, ids.shape[1], STRIDE), ids.shape[1]]:
        seen = ids[:, max(0, end - WINDOW - 1) : end]
        logits = model(seen[:, :-1]).logits[0].double()
        labels = seen[0, 1:]
        new = end - before
        total -= float(logits.log_softmax(-1).gather(-1, labels[:, None])[-new:].sum())
        before = end
    return total


def test_perplexity_is_that_of_transformers_on_every_layout(workspace: Workspace, model: str) -> None:
    expected = nats_by_transformers(workspace.path / "model-hf", TEXT)
    flags = ["--text", "text.txt", "other.jsonl", "--window", str(WINDOW), "--stride", str(STRIDE)]
    results = {}
    for name, (ranks, layout) in LAYOUTS.items():
        done = workspace.run(COMMAND, "evaluate", model, *flags, *layout, "--save", f"results-{name}", ranks=ranks)
        results[name] = json.loads((workspace.path / f"results-{name}" / "results.json").read_text())
        found = results[name]["text"]
        assert found["files"]["text.txt"]["nats"] == pytest.approx(expected, rel=1e-6)
        assert found["files"]["text.txt"]["bytes"] == len(TEXT.encode())
        assert f"{found['bits_per_byte']:.4f} bits per byte" in done.stdout
    first = results["alone"]["text"]
    assert first["loss"] == pytest.approx(first["nats"] / first["tokens"])
    assert first["bits_per_byte"] == pytest.approx(first["nats"] / math.log(2) / first["bytes"])
    assert all(found["text"]["nats"] == pytest.approx(first["nats"], rel=1e-6) for found in results.values())


def test_results_lie_beside_the_checkpoint_and_earlier_ones_are_kept(workspace: Workspace, model: str) -> None:
    own = workspace.path / model / "results.json"
    for words in (["--window", "32"], ["--window", "16", "--dtype", "bfloat16"]):
        workspace.run(COMMAND, "evaluate", model, "--text", "other.jsonl", *words)
    found = json.loads(own.read_text())
    assert found["text"]["size"] == 16
    assert found["checkpoint"]["path"] == str(workspace.path / model)
    own.write_text(json.dumps(found | {"val_loss": 1.0, "checkpoint": found["checkpoint"] | {"fingerprint": "older"}}))
    workspace.run(COMMAND, "evaluate", model, "--text", "other.jsonl")
    assert "val_loss" not in json.loads(own.read_text())
    assert json.loads((own.parent / "results-release.json").read_text())["val_loss"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--text", "text.txt", "--window", "8", "--stride", "9"], "stride"),
        (["--text", "text.txt", "--save", "data"], "holds no results"),
        (["--text", "text.txt", "--batch-tokens", "0"], "--batch-tokens"),
        (["--text", "text.txt", "--pipeline-model-parallel-size", "2"], "world size"),
    ],
)
def test_wrong_requests_end_at_once(workspace: Workspace, model: str, flags: list[str], message: str) -> None:
    done = workspace.run(COMMAND, "evaluate", model, *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
