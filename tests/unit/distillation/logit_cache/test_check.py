"""What the command line of a cache means, before anything starts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.data.sample_id import to_hex
from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.logit_cache.check import command_line, compared
from megatron_ext.distillation.logit_cache.manifest import Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader, CacheWriter
from megatron_ext.distillation.logit_cache.write import _finish, _Stored
from megatron_ext.distillation.options import DistillOptions, source_of
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.objective import Objective
from megatron_ext.options.early_flags import read_early


def line(words: list[str]) -> list[str]:
    return command_line(words, read_early(words, {"distill": DistillOptions}))


WRITE = ["--distill-teacher", "t", "--distill-cache-write", "c"]
MANIFEST = Manifest(7, "float16", 2.0, 64, 512, "fingerprint", "float32", [False, False], seed=1)


def test_writing_takes_the_model_from_the_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line(["--lr", "1"]) == ["--lr", "1"]
    assert line(WRITE) == [*WRITE, "--preset", str(tmp_path / "t"), "--skip-train"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (WRITE[2:], "needs the teacher"),
        ([*WRITE, "--load", "x"], "got:   --load"),
        ([*WRITE, "--save=x", "--distill-cache", "y"], "got:   --save, --distill-cache\n"),
    ],
)
def test_writing_does_nothing_else(argv, message):
    with pytest.raises(ConfigError, match=message):
        line(argv)


def test_a_cache_decides_the_defaults(tmp_path):
    cache = Cache(tmp_path, MANIFEST)
    assert compared(DistillOptions(), cache) == Objective("top-k-rest", 2.0, k=7)
    given = DistillOptions(loss="top-k", temperature=1.0, top_k=3)
    assert compared(given, cache) == Objective("top-k", 1.0, k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [(DistillOptions(), "is missing"), (DistillOptions(teacher="t", cache="c"), "one too many")],
)
def test_there_is_one_source(options, message):
    with pytest.raises(ConfigError, match=message):
        source_of(options)


def test_what_only_fills_a_batch_is_not_stored(tmp_path):
    """Nor a sample whose logits are not finite; the error waits for the end of the step."""
    manifest = replace(MANIFEST, k=2, sequence_length=3, dtype="float32")
    ids = torch.arange(8).view(4, 2)
    kept = TopK(torch.zeros(12, 2).long(), torch.full((12, 2), -1.0), torch.full((12,), -2.0))
    with CacheWriter(tmp_path, manifest) as writer:
        stored = _Stored(writer, manifest, left=3)
        stored.add(ids, kept, torch.tensor([True, False, True, True]))
    assert CacheReader(tmp_path, manifest).known() == {ids[i].numpy().tobytes() for i in (0, 2)}
    assert stored.left == 0
    assert f"sample {to_hex(ids[1])}" in str(stored.problem)


@pytest.mark.parametrize(("left", "stopped", "lost"), [(0, False, 0), (2, False, 2), (2, True, 0)])
def test_a_cache_is_whole_when_the_disk_has_what_was_computed(tmp_path, left: int, stopped: bool, lost: int):
    manifest = replace(MANIFEST, k=2, sequence_length=3, dtype="float32")
    manifest.write(tmp_path)
    ids = torch.arange(6).view(3, 2)
    kept = TopK(torch.zeros(9, 2).long(), torch.full((9, 2), -1.0), torch.full((9,), -2.0))
    with CacheWriter(tmp_path, manifest, shard_bytes=1) as writer:
        writer.add(ids, kept)
    run, writing = SimpleNamespace(args=SimpleNamespace(rank=0)), SimpleNamespace(directory=tmp_path, manifest=manifest)

    def finish() -> None:
        _finish(run, writing, _Stored(writer, manifest, left), stopped)  # type: ignore[arg-type]

    if lost:
        with pytest.raises(DataError, match=rf"holds less than was computed\n  got:   {lost} sequences"):
            finish()
    else:
        finish()
    assert Manifest.read(tmp_path).sequences == (None if stopped or lost else 3)
    manifest.write(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()  # as another rank's file that has taken its name would
    with pytest.raises(DataError, match=rf"holds less than was computed\n  got:   {lost + 1} sequences"):
        finish()
    assert Manifest.read(tmp_path).sequences is None
