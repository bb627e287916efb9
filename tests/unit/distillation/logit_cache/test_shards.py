"""What a cache gives back is what was put in, found by content; what does not fit is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from megatron_ext import cli
from megatron_ext.data.sample_id import hash_samples, to_hex
from megatron_ext.distillation.logit_cache import shards
from megatron_ext.distillation.logit_cache.cache import Cache, begin
from megatron_ext.distillation.logit_cache.manifest import MANIFEST, Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader, CacheWriter, Shard
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.objective import Objective

S, B, K, V = 6, 3, 5, 40
OWN = Manifest(K, "float32", 2.0, S, V, "fingerprint", "float32", [False, False], seed=1)


def tokens(count: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    windows = torch.randint(V, (count, S + 1), generator=torch.Generator().manual_seed(seed))
    return windows[:, :-1], windows[:, 1:]


def distribution(count: int = B, seed: int = 0, vocabulary: int = V) -> Tensor:
    """Logarithms of probabilities (s b v), in float64."""
    logits = torch.randn(S, count, vocabulary, generator=torch.Generator().manual_seed(seed)).double()
    return (3 * logits).log_softmax(-1)


def kept(log: Tensor, k: int = K) -> TopK:
    """The k likeliest of (s b v), by a plain sum."""
    log_q, index = log.topk(k, dim=-1)
    rest = log.exp().scatter(-1, index, 0).sum(-1).log()
    return TopK(index.flatten(0, 1), log_q.flatten(0, 1).float(), rest.flatten().float())


def write(directory: Path, manifest: Manifest = OWN, count: int = B, **options: int) -> Tensor:
    directory.mkdir(exist_ok=True)
    manifest.write(directory)
    sample_id = hash_samples(*tokens(count))
    with CacheWriter(directory, manifest, **options) as writer:
        writer.add(sample_id, kept(distribution(count, vocabulary=manifest.vocabulary), manifest.k))
    replace(manifest, sequences=count).write(directory)
    return sample_id


def test_gives_back_what_was_put_in(tmp_path: Path) -> None:
    """In any order of samples and positions, and for any smaller k what that k would have stored."""
    ids, log = write(tmp_path), distribution()
    order, at = [2, 0], torch.tensor([4, 1])
    for k in (K, 2):
        got, want = CacheReader(tmp_path, OWN).read(ids[order], at, k), kept(log[at][:, order], k)
        assert got.index.equal(want.index)
        torch.testing.assert_close(got.log_q, want.log_q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.log_rest, want.log_rest, rtol=1e-5, atol=1e-6)


def test_the_whole_vocabulary_leaves_no_rest(tmp_path: Path) -> None:
    ids = write(tmp_path, own := replace(OWN, k=V))
    got = CacheReader(tmp_path, own).read(ids, torch.arange(S), V)
    assert got.log_rest.eq(-torch.inf).all()
    expected = distribution().flatten(0, 1).gather(-1, got.index)
    torch.testing.assert_close(got.log_q.double(), expected, rtol=1e-6, atol=1e-6)


def test_half_precision_is_near_and_sums_to_one(tmp_path: Path) -> None:
    ids = write(tmp_path, own := replace(OWN, dtype="float16"))
    got, want = CacheReader(tmp_path, own).read(ids, torch.arange(S), K), kept(distribution())
    assert got.index.equal(want.index)
    torch.testing.assert_close(got.log_q, want.log_q, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got.log_q, want.log_q, rtol=1e-6, atol=1e-6)  # it was rounded
    total = got.log_q.double().exp().sum(-1) + got.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "index", "size"),
    [(2**16, "float16", "uint16", 24), (2**16, "float32", "uint16", 34), (2**16 + 1, "float16", "int32", 34)],
)
def test_any_vocabulary_in_as_few_bytes_as_said(
    tmp_path: Path, vocabulary: int, dtype: str, index: str, size: int
) -> None:
    manifest = replace(OWN, vocabulary=vocabulary, dtype=dtype)
    last = TopK(torch.arange(vocabulary - K, vocabulary).expand(S, K), torch.full((S, K), -2.0), torch.full((S,), -1.0))
    manifest.write(tmp_path)
    with CacheWriter(tmp_path, manifest) as writer:
        writer.add(ids := hash_samples(*tokens(1)), last)
    (shard,) = tmp_path.glob("*.safetensors")
    held = load_file(shard)
    assert str(held["index"].dtype) == index
    assert str(held["log_q"].dtype) == dtype
    assert manifest.bytes_per_token == size
    assert sum(array.nbytes for array in held.values()) == S * size + 16 + 8
    assert CacheReader(tmp_path, manifest).read(ids, torch.arange(S), K).index.equal(last.index)


def test_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Every sample is stored once, in shards of the size asked for; an interruption loses nothing that was added."""
    first, second = hash_samples(*tokens(4)), hash_samples(*tokens(7))
    assert first.equal(second[:4])
    room = {"shard_bytes": 3 * S * OWN.bytes_per_token}
    OWN.write(tmp_path)
    writer = CacheWriter(tmp_path, OWN, **room)
    writer.__enter__().add(first, kept(distribution(4)))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    before = set(tmp_path.glob("*.safetensors"))
    assert len(before) == 2
    known = CacheReader(tmp_path, OWN).known()
    assert known == {each.numpy().tobytes() for each in first}
    with CacheWriter(tmp_path, OWN, known, **room) as writer:
        writer.add(second, kept(distribution(7, seed=1)))
        writer.add(second, kept(distribution(7, seed=2)))
    assert before < set(tmp_path.glob("*.safetensors"))
    assert len(CacheReader(tmp_path, OWN).known()) == 7
    assert sum(len(load_file(shard)["index"]) for shard in tmp_path.glob("*.safetensors")) == 7
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + [".safetensors"] * 3
    got = CacheReader(tmp_path, OWN).read(first, torch.arange(S), K)
    assert got.index.equal(kept(distribution(4)).index)  # what was there stays


def test_a_missing_sample_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    read, labels = tokens(1, seed=9)
    foreign = hash_samples(read, labels)
    whose = torch.cat([hash_samples(*tokens())[:1], foreign])
    with pytest.raises(DataError) as error:
        CacheReader(tmp_path, OWN).read(whose, torch.arange(S), K, labels.expand(2, S))
    assert to_hex(foreign[0]) in str(error.value)
    assert f"begins with {labels[0, :8].tolist()}" in str(error.value)
    assert "--distill-cache-write" in str(error.value)
    with pytest.raises(DataError, match="not in the cache"):
        CacheReader(tmp_path / "empty", OWN).read(foreign, torch.arange(S), K)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    ids = write(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=shard.name):
        CacheReader(tmp_path, OWN)
    for place in range(0, len(whole), 5):  # a bit of the header, of an identity, of a value, of a checksum
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=shard.name):
            CacheReader(tmp_path, OWN).read(ids, torch.arange(S), K)
    shard.write_bytes(whole)
    CacheReader(tmp_path, OWN).read(ids, torch.arange(S), K)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("index", V, f"token {V} in a vocabulary of {V}"),
        ("log_q", 0.5, "no logarithms of probabilities"),
        ("log_q", torch.nan, "no logarithms of probabilities"),
        ("log_rest", torch.nan, "no logarithms of probabilities"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, column: str, value: float, message: str) -> None:
    """Though their checksum is right."""
    OWN.write(tmp_path)
    wrong = kept(distribution())
    getattr(wrong, column)[1] = value
    with CacheWriter(tmp_path, OWN) as writer:
        writer.add(ids := hash_samples(*tokens()), wrong)
    with pytest.raises(DataError, match=message):
        CacheReader(tmp_path, OWN).read(ids, torch.arange(S), K)


def test_a_changed_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = tmp_path / MANIFEST
    text = manifest.read_text()
    for before, after in (('"temperature": 2.0', '"temperature": 1.0'), (f'"sequences": {B}', f'"sequences": {B - 1}')):
        manifest.write_text(text.replace(before, after))
        assert manifest.read_text() != text
        with pytest.raises(DataError, match=r"manifest is damaged[^@]*manifest\.json"):
            Cache.find(tmp_path)


def test_a_shard_of_another_cache_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "hot")
    write(tmp_path / "cold", other := replace(OWN, temperature=1.0))
    (shard,) = (tmp_path / "cold").glob("*.safetensors")
    shard.rename(tmp_path / "hot" / shard.name)
    with pytest.raises(DataError, match="of another cache"):
        Cache.find(tmp_path / "hot")
    with pytest.raises(DataError, match="of another cache"):
        Shard(tmp_path / "hot" / shard.name, replace(other, teacher="another"))


def test_a_lost_shard_is_missed(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    stored = list(tmp_path.glob("*.safetensors"))
    assert len(stored) == B
    stored[0].unlink()
    with pytest.raises(DataError, match=f"lost samples[^@]*{B - 1} of {B}"):
        Cache.find(tmp_path)


def test_no_two_processes_write_under_one_name(tmp_path: Path) -> None:
    """Though their first sample is the same: one has it alone, the other has more."""
    ids, log = hash_samples(*tokens()), kept(distribution())
    OWN.write(tmp_path)
    first = TopK(*(x.unflatten(0, (S, B))[:, :1].flatten(0, 1) for x in (log.index, log.log_q, log.log_rest)))
    for some, entries in ((ids, log), (ids[:1], first)):
        with CacheWriter(tmp_path, OWN) as writer:
            writer.add(some, entries)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert CacheReader(tmp_path, OWN).known() == {each.numpy().tobytes() for each in ids}
    torch.testing.assert_close(CacheReader(tmp_path, OWN).read(ids, torch.arange(S), K).log_q, log.log_q)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OWN.write(tmp_path)
    with CacheWriter(tmp_path, OWN) as writer:
        writer.add(hash_samples(*tokens(1)), kept(distribution(1)))

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"a part")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", save_file)
    full = CacheWriter(tmp_path, OWN)
    full.add(hash_samples(*tokens(3, seed=1)), kept(distribution(3)))
    with pytest.raises(DataError, match=r"cannot be written[^@]*No space left on device") as error, full:
        pass
    assert len(str(error.value).splitlines()[0]) < 120
    assert len(CacheReader(tmp_path, OWN).known()) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_only_a_finished_cache_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert f"{tmp_path}: whole, {B} sequences" in capsys.readouterr().out
    assert Cache.find(tmp_path).manifest == OWN
    assert Cache.find(tmp_path).manifest.sequences == B
    OWN.write(tmp_path)
    with pytest.raises(DataError, match="not finished"):
        Cache.find(tmp_path)
    for content in ("{", "[]", json.dumps({"format": 2, "k": 3}), json.dumps({"format": 1})):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(DataError, match=r"damaged|another format"):
            Cache.find(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        Cache.find(tmp_path / "nowhere")
    write(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "has lost samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        (Objective("top-k-rest", 2.0, k=K), {}, None),
        (Objective("top-k", 2.0, k=2), {}, None),
        (Objective("forward-kl", 2.0, k=K), {}, "top-k-rest, top-k$"),
        (Objective("reverse-kl", 2.0, k=K), {}, "top-k-rest, top-k$"),
        (Objective("top-k", 2.0, k=K + 1), {}, "fewer entries"),
        (Objective("top-k", 1.0, k=K), {}, "temperature"),
        (Objective("top-k", 2.0, k=K), {"sequence_length": S + 1}, "sequence length"),
        (Objective("top-k", 2.0, k=K), {"vocabulary": V + 1}, "vocabulary"),
    ],
)
def test_a_job_gets_what_there_is(tmp_path: Path, objective: Objective, data: dict, message: str | None) -> None:
    write(tmp_path)
    cache = Cache.find(tmp_path)
    if message is None:
        cache.check(objective, sequence_length=S, vocabulary=V)
        return
    with pytest.raises(ConfigError, match=message):
        cache.check(objective, **data)


def test_forward_kl_needs_the_whole_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, replace(OWN, k=V))
    Cache.find(tmp_path).check(Objective("forward-kl", 2.0, k=K))


def test_a_cache_is_gone_on_with_under_its_own_settings_only(tmp_path: Path) -> None:
    assert begin(tmp_path, OWN) == OWN  # an empty directory
    write(tmp_path)
    ours = begin(tmp_path, replace(OWN, seed=2, provenance={"teacher": "moved"}))
    assert (ours.seed, ours.sequences) == (1, None)  # packed as it was, and unfinished from now on
    for change in ({"k": 4}, {"dtype": "float16"}, {"temperature": 1.0}, {"teacher": "another"}, {"vocabulary": 41}):
        (field, value), *_ = change.items()
        with pytest.raises(ConfigError, match=f"{field} {value}"):
            begin(tmp_path, replace(OWN, **change))
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no cache"):
        begin(foreign, OWN)
