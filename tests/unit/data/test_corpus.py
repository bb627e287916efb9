"""`megatron-ext data`: what goes in comes out, exactly, or nothing does."""

import argparse
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_ext import cli
from megatron_ext.data import corpus
from megatron_ext.data.documents import find_documents
from megatron_ext.errors import CheckpointError, ConfigError, DataError

TEXTS = {
    "a.py": "def f(x):\n    return x  # naïve\n" * 5,
    "b.txt": "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 语言模型 🦫\r\n\ttab\n",
    "sub/c.md": "A text that spells <|endoftext|> and goes on.\n" * 3,
    "sub/deep/d": "no extension, no newline at the end",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def documents(out: Path) -> list[np.ndarray]:
    """The token ids of each document, read back with Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(out / "text_document"))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1)), "one sequence per document"
    return [dataset[i].copy() for i in range(len(dataset))]  # the views die with the dataset's memory map


def decoded(out: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    texts = []
    for ids in documents(out):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_round_trip(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    summary = corpus.build_dataset(out, [source], vocab_size=300)

    assert sorted(decoded(out)) == sorted(TEXTS.values())
    assert summary.documents == 4
    assert summary.tokens == sum(len(ids) for ids in documents(out))
    assert summary.bytes == sum(len(text.encode()) for text in TEXTS.values())
    assert summary.skipped == {}
    assert summary.vocab_size == len(AutoTokenizer.from_pretrained(out / "tokenizer")) == 300
    assert AutoTokenizer.from_pretrained(out / "tokenizer").eos_token == corpus.EOD
    assert all(ids.dtype == np.uint16 for ids in documents(out))


def test_manifest_says_what_was_written(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    summary = corpus.build_dataset(out, [source], vocab_size=300)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["bin_sha256"] == hashlib.sha256((out / "text_document.bin").read_bytes()).hexdigest()
    assert manifest["tokenizer"] == "trained"
    assert manifest["bytes_per_token"] == summary.bytes / summary.tokens
    assert sorted(path.name for path in out.iterdir()) == [
        *("checksums.json", "manifest.json", "text_document.bin", "text_document.idx", "tokenizer"),
    ]


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path):
    for name in ("one", "two"):
        corpus.build_dataset(tmp_path / name, [source], vocab_size=320)
    for file in (
        "text_document.bin",
        "text_document.idx",
        "manifest.json",
        "tokenizer/tokenizer.json",
        "checksums.json",
    ):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_documents_are_shuffled_by_the_seed(tmp_path: Path):
    lines = [f"document {i}" for i in range(50)]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    orders = []
    for seed in (1, 2):
        corpus.build_dataset(tmp_path / str(seed), [file], vocab_size=300, seed=seed)
        orders.append(decoded(tmp_path / str(seed)))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(lines)
    assert len({*map(tuple, orders), tuple(lines)}) == 3


def test_skips_are_counted_by_reason(source: Path, tmp_path: Path):
    (source / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    (source / "latin1.txt").write_bytes("Übung".encode("latin-1"))
    (source / "nul.txt").write_bytes(b"text\0text")
    (source / "empty.txt").write_bytes(b"")
    (source / "blank.txt").write_bytes(b" \n\n")
    (source / ".hidden").write_bytes(b"not read at all")
    (source / "gone.txt").symlink_to(source / "nowhere")
    summary = corpus.build_dataset(tmp_path / "out", [source], vocab_size=300)
    assert summary.skipped == {"binary": 1, "empty": 2, "undecodable": 2}
    assert sorted(decoded(tmp_path / "out")) == sorted(TEXTS.values())


def test_jsonl_is_one_document_per_line(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    lines = [
        json.dumps({"body": "first\nwith a newline", "id": 1}),
        json.dumps({"body": "zweites, später"}, ensure_ascii=False),
        "",
        json.dumps({"other": "no body"}),
        json.dumps({"body": 3}),
        json.dumps(["body"]),
        '{"body": "cut o',
        r'{"body": "half a pair \ud800"}',
        json.dumps({"body": ""}),
        json.dumps({"body": "last, and no newline after it"}),
    ]
    file.write_bytes("\n".join(lines).encode())
    summary = corpus.build_dataset(tmp_path / "out", [file], vocab_size=300, json_key="body")
    assert sorted(decoded(tmp_path / "out")) == [
        *("first\nwith a newline", "last, and no newline after it", "zweites, später"),
    ]
    assert summary.skipped == {"empty": 1, "undecodable": 1, "without the JSON key": 4}


def test_a_file_named_twice_is_read_once(source: Path, tmp_path: Path):
    summary = corpus.build_dataset(tmp_path / "out", [source, source / "a.py", source / "sub"], vocab_size=300)
    assert summary.documents == 4


def test_max_bytes_stops_with_the_document_that_reaches_it(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "ten bytes."}\n' * 100)
    summary = corpus.build_dataset(tmp_path / "out", [file], vocab_size=300, max_bytes=95)
    assert (summary.documents, summary.bytes) == (10, 100)


def test_a_given_tokenizer_is_used_and_kept(source: Path, tmp_path: Path):
    corpus.build_dataset(tmp_path / "first", [source], vocab_size=280)
    given = tmp_path / "first" / "tokenizer"
    summary = corpus.build_dataset(tmp_path / "second", [source], given, vocab_size=9999)
    assert (summary.tokenizer, summary.vocab_size) == ("given", 280)
    for file in ("text_document.bin", "text_document.idx"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert sorted(decoded(tmp_path / "second")) == sorted(TEXTS.values())


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (False, False), (True, True)])
def test_documents_begin_as_the_tokenizers_own_texts_do(bos: bool | None, begins: bool, tmp_path: Path):
    """With a tokenizer whose post-processor puts BOS first, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "?": 2, "one": 3, "two": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    llama.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text('{"text": "one two one"}\n{"text": "two"}\n')
    summary = corpus.build_dataset(tmp_path / "out", [tmp_path / "in.jsonl"], tmp_path / "tokenizer", bos=bos)
    right = [[*([0] if begins else []), *words, 1] for words in ([3, 4, 3], [4])]
    assert sorted(map(list, documents(tmp_path / "out"))) == sorted(right)
    assert summary.bos == begins == json.loads((tmp_path / "out/manifest.json").read_text())["bos"]
    if begins and bos is None:  # transformers' own
        assert right[0][:-1] == AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")("one two one")["input_ids"]


def test_no_bos_token_no_bos(source: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no token that begins a text"):
        corpus.build_dataset(tmp_path / "out", [source], vocab_size=300, bos=True)
    assert left_behind(tmp_path) == []
    assert not corpus.build_dataset(tmp_path / "out", [source], vocab_size=300).bos


def test_megatron_sees_the_same_vocabulary_and_eod(source: Path, tmp_path: Path):
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    summary = corpus.build_dataset(tmp_path / "out", [source], vocab_size=300)
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer.vocab_size == summary.vocab_size
    assert tokenizer.eod == documents(tmp_path / "out")[0][-1]
    assert tokenizer.ids_to_text(tokenizer.text_to_ids("Zwölf\n  x")) == "Zwölf\n  x"


def padded(vocab: int, divisor: int, tp: int) -> int:
    """Megatron's rule (megatron/training/vocab_utils.py)."""
    return math.ceil(vocab / (divisor * tp)) * divisor * tp


@given(st.integers(4033, 300_000))
def test_the_padded_vocabulary_does_not_depend_on_tensor_parallelism(vocab: int):
    divisor, size = corpus.vocab_divisor(vocab)
    assert {padded(vocab, divisor, tp) for tp in (1, 2, 4, 8, 16, 32, 64)} == {size}
    assert 0 <= size - vocab < 64


@given(st.integers(257, 4096))
def test_nor_does_a_small_one(vocab: int):
    divisor, size = corpus.vocab_divisor(vocab)
    assert {padded(vocab, divisor, tp) for tp in (1, 2, 4, 8)} == {size}
    assert 0 <= size - vocab < 64


@pytest.mark.parametrize(("vocab", "expected"), [(4096, (64, 4096)), (50257, (786, 50304)), (128256, (2004, 128256))])
def test_known_vocabularies(vocab: int, expected: tuple[int, int]):
    assert corpus.vocab_divisor(vocab) == expected


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name not in ("source", "in.jsonl", "tokenizer")]


def test_missing_input_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        corpus.build_dataset(tmp_path / "out", [tmp_path / "nowhere"])
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("given", [True, False])
def test_input_without_text_leaves_nothing_behind(given: bool, source: Path, tmp_path: Path):
    if given:
        corpus.build_dataset(tmp_path / "first", [source], vocab_size=280)
        (tmp_path / "first" / "tokenizer").rename(tmp_path / "tokenizer")
        for file in (tmp_path / "first").iterdir():
            file.unlink()
        (tmp_path / "first").rmdir()
    (tmp_path / "in.jsonl").write_text('{"txt": "hello"}\n')
    with pytest.raises(DataError, match="'without the JSON key': 1"):
        corpus.build_dataset(tmp_path / "out", [tmp_path / "in.jsonl"], tmp_path / "tokenizer" if given else None)
    assert left_behind(tmp_path) == []


def test_interruption_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        corpus.build_dataset(tmp_path / "out", [source], vocab_size=300)
    assert left_behind(tmp_path) == []


def test_existing_output_is_refused_and_kept(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        corpus.build_dataset(tmp_path / "out", [source])
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        corpus.build_dataset(source / "a.py", [source])
    with pytest.raises(ConfigError, match="not a directory"):
        corpus.build_dataset(source / "a.py" / "out", [source])
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert left_behind(tmp_path) == ["out"]


def test_an_empty_output_directory_is_accepted(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    corpus.build_dataset(tmp_path / "out", [source], vocab_size=300)
    assert left_behind(tmp_path) == ["out"]


def test_unusable_tokenizers(source: Path, tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    with pytest.raises(DataError, match="no such tokenizer"):
        corpus.build_dataset(tmp_path / "out", [source], tokenizer)
    tokenizer.mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        corpus.build_dataset(tmp_path / "out", [source], tokenizer)

    corpus.build_dataset(tmp_path / "good", [source], vocab_size=280)
    config = json.loads((tmp_path / "good/tokenizer/tokenizer_config.json").read_text())
    del config["eos_token"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer / "tokenizer.json").write_bytes((tmp_path / "good/tokenizer/tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="no end-of-document token"):
        corpus.build_dataset(tmp_path / "out", [source], tokenizer)
    assert left_behind(tmp_path) == ["good"]


@pytest.mark.parametrize("bad", [{"vocab_size": 256}, {"max_bytes": 0}])
def test_sizes_out_of_range(bad: dict[str, int], source: Path, tmp_path: Path):
    with pytest.raises(ConfigError):
        corpus.build_dataset(tmp_path / "out", [source], **bad)


def test_the_command_prints_the_flags(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    corpus.add_arguments(parser)
    out = tmp_path / "out"
    corpus.main(parser.parse_args(["--out", str(out), "--input", str(source), "--vocab-size", "300"]))
    printed = capsys.readouterr().out
    assert f"--data-path {out}/text_document --tokenizer-type HuggingFaceTokenizer" in printed
    assert f"--tokenizer-model {out}/tokenizer --make-vocab-size-divisible-by" in printed
    assert "4 documents" in printed


def test_the_default_corpus_is_the_standard_library(tmp_path: Path):
    summary = corpus.build_dataset(tmp_path / "out", vocab_size=512, max_bytes=300_000)
    assert summary.bytes >= 300_000
    assert summary.vocab_size == 512
    names = {document.path.name for document in find_documents(None)}
    assert {"argparse.py", "dataclasses.py"} < names
    assert not any("site-packages" in str(document.path) for document in find_documents(None))


def test_a_jsonl_file_is_opened_once_and_not_for_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice, to find the lines and to read them; and the order of the shuffle is that of the text."""
    from megatron_ext.data.documents import texts_of

    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        lines = [json.dumps({"text": f"{file.stem}{i} \u2028 \u0085"}, ensure_ascii=False) for i in range(50)]
        file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    opened: list[Path] = []
    real = io.open

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", counting)  # which reads
    monkeypatch.setattr("io.open", counting)  # which finds the lines: Path.open
    found = find_documents(files)
    order = [found[i * 37 % 100] for i in range(100)]
    texts = list(texts_of(order, "text", None))
    straight = [f"{name}{i} \u2028 \u0085" for name in "ab" for i in range(50)]
    assert texts == [straight[i * 37 % 100] for i in range(100)]
    assert sorted(opened) == sorted(files * 2)


def test_a_dataset_agrees_with_its_manifest_and_with_the_run(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A run with another tokenizer, a smaller vocabulary or changed bytes is refused; without a manifest, taken."""
    from megatron_ext.checkpoint.tokenizer import fingerprint
    from megatron_ext.data import manifest

    for name, size in (("one", 300), ("two", 310)):
        corpus.build_dataset(tmp_path / name, [source], vocab_size=size)
    one, two = (fingerprint(tmp_path / name / "tokenizer") for name in ("one", "two"))
    prefix = str(tmp_path / "one/text_document")
    manifest.check(prefix, one, 300)
    manifest.check(prefix, None, 320)
    with pytest.raises(DataError, match=r"(?s)another tokenizer.*--tokenizer-model .*one/tokenizer"):
        manifest.check(prefix, two, 320)
    with pytest.raises(DataError, match=r"(?s)300 tokens.*299 at most"):
        manifest.check(prefix, None, 299)
    assert manifest.verify(tmp_path / "one")["vocab_size"] == 300
    assert cli.main(["verify", str(tmp_path / "one")]) == 0
    assert f"{tmp_path / 'one'}: " in capsys.readouterr().out
    content = (tmp_path / "one/text_document.bin").read_bytes()
    (tmp_path / "one/text_document.bin").write_bytes(bytes(len(content)))
    for check in (lambda: manifest.check(prefix, one, 300), lambda: manifest.verify(tmp_path / "one")):
        with pytest.raises(DataError, match="not what `megatron-ext data` wrote"):
            check()
    assert cli.main(["verify", str(tmp_path / "one")]) == 2
    note = tmp_path / "one/manifest.json"
    note.write_text(note.read_text().replace('"vocab_size": 300', '"vocab_size": 299'))
    with pytest.raises(CheckpointError, match=r"damaged: manifest\.json"):
        manifest.check(prefix, one, 300)
    (tmp_path / "one/checksums.json").unlink()  # as beside data of an older version
    note.write_text(note.read_text()[:-9])
    with pytest.raises(DataError, match="manifest of the data is damaged"):
        manifest.check(prefix, one, 300)
    note.unlink()
    manifest.check(prefix, two, 1)
    with pytest.raises(DataError, match="no dataset of"):
        manifest.verify(tmp_path / "one")


def test_the_command_verifies(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    corpus.add_arguments(parser)
    corpus.build_dataset(tmp_path / "out", [source], vocab_size=300)
    corpus.main(parser.parse_args(["--verify", str(tmp_path / "out")]))
    assert "tokens, as they were written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["--verify", "a", "--out", "b"])
