"""Distillation from a cache: written on one layout, read on any other, it stands for the live teacher."""

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from workspace import ROOT, TRAIN, Workspace

from megatron_ext import cli
from megatron_ext.distillation.logit_cache.manifest import Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader
from tests.functional.test_distill import STUDENT

DATA = [
    "--data-path", "small/text_document", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
    "data/tokenizer", "--make-vocab-size-divisible-by", "8", "--split", "50,50,0", "--seq-length", "64",
    "--padded-vocab-size", "512",
]  # fmt: skip
BATCH = ["--micro-batch-size", "2", "--global-batch-size", "8"]


@pytest.fixture(scope="module")
def student(workspace: Workspace) -> str:
    """Two documents of some 22 sequences each, one to train on and one to validate, and a student after a step."""
    source = Path(argparse.__file__).read_text()
    texts = workspace.path / "texts"
    texts.mkdir()
    for i in range(2):
        (texts / f"{i}.txt").write_text(source[20_000 * i : 20_000 * i + 3_200])
    out, tokenizer = str(workspace.path / "small"), str(workspace.path / "data/tokenizer")
    assert cli.main(["data", "--out", out, "--tokenizer", tokenizer, "--input", str(texts)]) == 0
    flags = [*STUDENT, *DATA, *BATCH, *TRAIN, "--train-iters", "1"]
    workspace.run("pretrain_hybrid.py", *flags, "--save", "cache-student")
    return "cache-student"


@pytest.fixture(scope="module")
def whole(workspace: Workspace, teacher: str, student: str) -> str:
    """A cache of the whole vocabulary, begun on two data- and two context-parallel ranks, and ended on two stages.

    The share of either data-parallel rank is lost on the way: the other then has nothing to compute.
    """
    cache = workspace.path / "whole"
    flags = ["--distill-teacher", teacher, "--distill-cache-write", "whole", *DATA, "--distill-top-k", "512"]
    flags += ["--distill-cache-dtype", "float32", "--micro-batch-size", "3"]
    begun = workspace.run("distill_gpt.py", *flags, "--context-parallel-size", "2", ranks=4)
    assert "512 of 512 entries and the rest per token, float32, temperature 1: 3,076 bytes per token" in begun.stdout
    manifest = Manifest.read(cache)
    assert f"holds {manifest.sequences} sequences" in begun.stdout
    shards = sorted(cache.glob("*.safetensors"))
    assert len(shards) == 2
    for goes, layout in zip(shards, (["--pipeline-model-parallel-size", "2"], []), strict=True):
        # As if it had been stopped before one data-parallel rank stored its share.
        size = goes.stat().st_size
        goes.unlink()
        (stays,) = set(cache.glob("*.safetensors"))
        written = stays.stat().st_mtime_ns
        replace(manifest, sequences=None).write(cache)
        known = len(CacheReader(cache, manifest).known())
        ended = workspace.run("distill_gpt.py", *flags, *layout, ranks=4 if layout else 2)
        assert f"{known} are stored already" in ended.stdout
        assert Manifest.read(cache) == manifest
        assert Manifest.read(cache).sequences == manifest.sequences == len(CacheReader(cache, manifest).known())
        assert stays.stat().st_mtime_ns == written
        (added,) = set(cache.glob("*.safetensors")) - {stays}
        assert added.stat().st_size == size
    return "whole"


@pytest.fixture(scope="module")
def likeliest(workspace: Workspace, teacher: str, student: str) -> str:
    """A cache of a few entries, written on two tensor-parallel ranks."""
    flags = ["--distill-teacher", teacher, "--distill-cache-write", "likeliest", "--distill-top-k", "16", *DATA]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "4"]
    workspace.run("distill_gpt.py", *flags, *layout, "--distill-temperature", "0.5", ranks=2)
    return "likeliest"


def read(workspace: Workspace, cache: str, save: str, *flags: str, steps: int = 4, ranks: int = 1) -> list[dict]:
    known = ["--distill-cache", cache, "--pretrained-checkpoint", "cache-student", *DATA, *BATCH, *TRAIN]
    run = [*known, "--train-iters", str(steps), "--save", save, *flags]
    workspace.run("distill_gpt.py", *STUDENT, *run, ranks=ranks)
    return workspace.metrics(save)


@pytest.fixture(scope="module")
def one_rank(workspace: Workspace, student: str, likeliest: str) -> list[dict]:
    """Four steps of eight sequences: more than the training split has, so that the second epoch begins."""
    sequences = Manifest.read(workspace.path / likeliest).sequences
    assert sequences is not None
    assert sequences < 32 + 16  # and the validation split has more than 16, two evaluations
    return read(workspace, likeliest, "cached")


def test_the_layout_changes_nothing(workspace: Workspace, likeliest: str, one_rank: list[dict]) -> None:
    """Nor the size of a micro-batch, nor an interruption: one run changes its layout on the way."""
    model_parallel = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    straight = read(workspace, likeliest, "cached-tp2-pp2", *model_parallel, ranks=4)
    read(workspace, likeliest, "halves", "--micro-batch-size", "1", "--exit-interval", "2", ranks=2)
    halves = read(workspace, likeliest, "halves", "--load", "halves", "--context-parallel-size", "2", ranks=2)
    for got in (straight, halves):
        assert len(got) == len(one_rank) == 4
        for key in ("loss", "kd_loss", "grad_norm"):
            assert [step[key] for step in got] == pytest.approx([step[key] for step in one_rank], rel=1e-5)
        for key in ("val_loss", "val_kd_loss"):
            assert got[-1][key] == pytest.approx(one_rank[-1][key], rel=1e-5)


def test_is_the_live_teacher(workspace: Workspace, teacher: str, student: str, whole: str) -> None:
    """Over the whole vocabulary as forward KL; within an epoch the batches are the same ones."""
    cached = read(workspace, whole, "from-whole", "--distill-loss", "forward-kl", steps=2)
    flags = ["--distill-teacher", teacher, "--pretrained-checkpoint", student, *DATA, *BATCH, *TRAIN]
    workspace.run("distill_gpt.py", *flags, "--train-iters", "2", "--save", "from-teacher")
    live = workspace.metrics("from-teacher")
    for key in ("loss", "kd_loss", "grad_norm"):
        assert [step[key] for step in cached] == pytest.approx([step[key] for step in live], rel=1e-5)
    assert cached[-1]["val_kd_loss"] == pytest.approx(live[-1]["val_kd_loss"], rel=1e-5)


def test_a_foreign_sample_is_named(workspace: Workspace, likeliest: str) -> None:
    flags = ["--distill-cache", likeliest, *DATA, *BATCH, *TRAIN, "--train-iters", "1", "--save", "foreign"]
    done = workspace.run("distill_gpt.py", *STUDENT, *flags, "--data-path", "data/text_document", ok=False)
    assert done.returncode == 2
    assert "a sample is not in the cache: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill-cache", "likeliest", "--seq-length", "32"], "sequence length is not this job's"),
        (["--distill-cache-write", "likeliest", "--distill-teacher", "teacher"], "another model than the teacher"),
        (["--distill-cache", "whole", "--load", "cached", "--save", "cached"], "cannot go on with another teacher"),
    ],
)
@pytest.mark.usefixtures("likeliest", "whole", "one_rank")
def test_bad_requests_end_at_once(workspace: Workspace, flags: list[str], message: str) -> None:
    done = workspace.run("distill_gpt.py", *STUDENT, *DATA, "--train-iters", "1", *flags, ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_writing_keeps_what_it_has(workspace: Workspace, teacher: str) -> None:
    data = [*DATA[2:], "--data-path", "data/text_document", "--distill-top-k", "4"]
    flags = ["--distill-teacher", teacher, "--distill-cache-write", "stopped-cache", *data, "--micro-batch-size", "1"]
    manifest = workspace.path / "stopped-cache" / "manifest.json"
    command = [sys.executable, str(ROOT / "distill_gpt.py"), *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=workspace.path, text=True, **streams) as run:
        while run.poll() is None and not manifest.is_file():
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    assert "stopped: the same command goes on from here" in said
    stored = Manifest.read(manifest.parent)
    assert stored.sequences is None
    assert CacheReader(manifest.parent, stored).known()
