"""Generation and scores on every layout are those of transformers."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS, make
from run_ranks import run_ranks

from megatron_ext.checkpoint.huggingface.convert import to_megatron

pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 6
STOP = 17  # a token that some continuations end with
PROMPTS = [[5, 9, 61], [3, 1, 4, 1, 5, 9, 2, 6, 5, 35], [7], [44, 2, 80, 21, 3], [11, 12, 13, 14, 15, 16, 17]]
TEXTS = [([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1), ([30, 20, 10], 2), ([60, 61, 62, 63, 64, 65, 66], 5), ([9, 90], 1)]
HYBRID = ["nemotron-h"]
# Ranks, flags, and which models.
LAYOUTS: dict[str, tuple[int, list[str], list[str]]] = {
    "alone": (1, [], list(MODELS)),
    "graph": (
        1,
        [],
        [name for name in MODELS if not name.startswith("gemma")],
    ),  # its steps, told by tensors where they are; a CPU takes them one by one
    "tp2-sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"], list(MODELS)),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"], ["llama3", "granite", "gemma3", "mamba2", *HYBRID]),
    "dp2": (2, [], ["llama3", "mamba2", *HYBRID]),
    "vpp2": (2, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern=M|-|*-|M"], HYBRID),
    "ep2": (2, ["--expert-model-parallel-size", "2"], ["nemotron-h-experts"]),
    "cp2": (2, ["--context-parallel-size", "2"], ["llama3", "gemma2", "gemma3", *HYBRID]),
}


@dataclass(frozen=True)
class Expected:
    """What transformers says: continuations without and with an end, log-probabilities, and which tokens are greedy."""

    new: list[list[int]]
    stopped: list[list[int]]
    scores: list[list[float]]
    greedy: list[list[bool]]


@torch.no_grad()
def by_transformers(path: Path) -> Expected:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def continued(prompt: list[int], end: int | None) -> list[int]:
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW, do_sample=False,
            eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        return made[0, len(prompt) :].tolist()

    scores, greedy = [], []
    for text, first in TEXTS:
        logits = model(torch.tensor([text])).logits[0, first - 1 : -1].double()
        labels = torch.tensor(text[first:])
        scores.append(logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].tolist())
        greedy.append((logits.argmax(-1) == labels).tolist())
    new, stopped = ([continued(prompt, end) for prompt in PROMPTS] for end in (None, STOP))
    return Expected(new, stopped, scores, greedy)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    """A folder with `NAME` and, converted and padded, `NAME-megatron`; and what transformers says of each."""
    path = tmp_path_factory.mktemp("inference")
    for name in MODELS:
        make(name, path / name)
        to_megatron(path / name, path / f"{name}-megatron", vocab_multiple=64)
    return path, {name: by_transformers(path / name) for name in MODELS}


def on_ranks(folder: str, names: list[str], flags: list[str], port: int, graph: bool) -> dict[str, Any]:
    """What this rank gets of every model."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_ext.checkpoint.resume import architecture_on_disk
    from megatron_ext.inference.session import prepare
    from megatron_ext.inference.tokenizer import vocab_size_of

    paths = {name: Path(folder) / f"{name}-megatron" for name in names}
    started = prepare(paths[names[0]], None, flags)
    from megatron.core.utils import unwrap_model

    from megatron_ext.inference import cached
    from megatron_ext.inference.sharded import ShardedModel
    from megatron_ext.training.forward import load_model, load_other

    if graph:
        cached.can_be_graphed = lambda model: True
    found = {}
    for name, path in paths.items():
        if name == names[0]:
            chunks = load_model(started)
        else:
            started, chunks = load_other(started, architecture_on_disk(path), path)
        model = ShardedModel(unwrap_model(chunks), started.architecture, vocab_size_of(path, None))
        found[name] = inferred(model, singly=dist.get_world_size() == 1)
    return found


def inferred(model: Any, singly: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_ext.errors import ConfigError
    from megatron_ext.inference.generate import generate
    from megatron_ext.inference.loglikelihood import LoglikelihoodRequest
    from megatron_ext.inference.request import Request
    from megatron_ext.inference.sampling import Sampling
    from megatron_ext.inference.score import score

    def new(sampling: Sampling, end: tuple[int, ...] = (), batch_size: int = 3) -> list[list[int]]:
        requests = [Request(prompt, NEW, frozenset(end)) for prompt in PROMPTS]
        made = dict(generate(model, requests, sampling, batch_size))
        return [made[i] for i in range(len(requests))]

    scores = dict(score(model, [LoglikelihoodRequest(*text) for text in TEXTS], batch_tokens=12))
    found: dict[str, Any] = {
        "scores": [scores[i].log_probabilities.tolist() for i in range(len(TEXTS))],
        "greedy": [scores[i].greedy.tolist() for i in range(len(TEXTS))],
    }
    greedy, drawn = Sampling(), Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=3)
    if parallel_state.get_context_parallel_world_size() > 1:
        with pytest.raises(ConfigError, match="no context parallelism"):
            new(greedy)
        return found
    return found | {
        "new": new(greedy),
        **({"one by one": new(greedy, batch_size=1)} if singly else {}),
        "stopped": new(greedy, (STOP,)),
        "drawn": new(drawn),
        "drawn in other batches": new(drawn, batch_size=5),
        "drawn by another seed": new(replace(drawn, seed=4)),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def found(models: tuple[Path, dict[str, Expected]]) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank of a layout gets of each model, computed once."""
    known: dict[str, list[dict[str, Any]]] = {}

    def on(layout: str) -> list[dict[str, Any]]:
        if layout not in known:
            ranks, flags, names = LAYOUTS[layout]
            known[layout] = run_ranks(on_ranks, ranks, str(models[0]), names, flags, free_port(), layout == "graph")
        return known[layout]

    return on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers_on_every_rank(
    models: tuple[Path, dict[str, Expected]], found: Callable[[str], list[dict[str, Any]]], layout: str
) -> None:
    for rank in found(layout):
        for name, ours in rank.items():
            expected = models[1][name]
            assert ours["greedy"] == expected.greedy, name
            for mine, theirs in zip(ours["scores"], expected.scores, strict=True):
                assert mine == pytest.approx(theirs, abs=2e-5), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cp2"])
def test_greedy_continuations_are_those_of_transformers_on_every_rank(
    models: tuple[Path, dict[str, Expected]], found: Callable[[str], list[dict[str, Any]]], layout: str
) -> None:
    assert any(len(new) < NEW for expected in models[1].values() for new in expected.stopped)  # some do end early
    for rank in found(layout):
        for name, ours in rank.items():
            assert ours["new"] == ours.get("one by one", ours["new"]) == models[1][name].new, name
            assert ours["stopped"] == models[1][name].stopped, name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cp2"])
def test_a_seed_draws_the_same_on_every_layout(found: Callable[[str], list[dict[str, Any]]], layout: str) -> None:
    for rank in found(layout):
        for name, ours in rank.items():
            assert ours["drawn"] == ours["drawn in other batches"] == found("alone")[0][name]["drawn"], name
            assert ours["drawn"] != ours["drawn by another seed"], name
            assert ours["drawn"] != ours["new"], name
