"""`megatron-ext data`: text, source files or JSONL to Megatron's indexed dataset and a Hugging Face tokenizer.

    DIR/text_document.bin, .idx    token ids, one document per file (JSONL: per line), each ending in the EOD token,
                                   and beginning with the BOS token where the tokenizer's own texts do
    DIR/tokenizer/                 tokenizer.json and tokenizer_config.json, for `AutoTokenizer`
    DIR/manifest.json              what went in, what came out
    DIR/checksums.json             of all these files

The documents are shuffled with a fixed seed, so that Megatron's `--split`, which cuts by position, validates on the
distribution it trains on.  The same input, seed and tokenizer give the same bytes.
"""

import argparse
import hashlib
import json
import math
import random
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext import platform
from megatron_ext.checkpoint.atomic import fresh_directory
from megatron_ext.checkpoint.file_checksums import write_rest
from megatron_ext.checkpoint.outputs import check_writable
from megatron_ext.checkpoint.tokenizer import fingerprint
from megatron_ext.data.documents import batches, find_documents, size_of, texts_of
from megatron_ext.data.manifest import MANIFEST, verify
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.reports.progress import Progress

EOD = "<|endoftext|>"
TOKENIZER_SAMPLE_BYTES = 16 << 20  # a few thousand merges do not change with more
BATCH_CHARACTERS = 2 << 20  # one parallel encode


@dataclass(frozen=True)
class DatasetSummary:
    """What `build_dataset` wrote.

    Attributes:
        out: The dataset's directory.
        inputs: What was read, as given.
        documents: Documents written.
        tokens: Tokens written, with one EOD (and one BOS, if `bos`) per document.
        bytes: UTF-8 bytes of the documents' text.
        bytes_per_token: `bytes / tokens`.  Nats per token / (this * ln 2) are bits per byte.
        skipped: Documents left out, by reason.
        vocab_size: Tokens in the tokenizer, added ones included.
        padded_vocab_size: Rows of the embedding that Megatron builds under `flags`.
        vocab_divisor: `--make-vocab-size-divisible-by`; see `vocab_divisor`.
        tokenizer: "trained" or "given".
        bos: Whether each document begins with the tokenizer's BOS token.
        seed: Seed of the shuffle.
        bin_sha256: Hash of `text_document.bin`.
        seconds: Wall time; not in `manifest.json`.
    """

    out: Path
    inputs: list[str]
    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    skipped: dict[str, int]
    vocab_size: int
    padded_vocab_size: int
    vocab_divisor: int
    tokenizer: str
    bos: bool
    seed: int
    bin_sha256: str
    seconds: float = field(compare=False)

    @property
    def flags(self) -> list[str]:
        """The flags that hand this dataset to Megatron."""
        return [
            *("--data-path", str(self.out / "text_document")),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(self.out / "tokenizer")),
            *("--make-vocab-size-divisible-by", str(self.vocab_divisor)),
        ]


def build_dataset(
    out: Path,
    inputs: Sequence[Path] | None = None,
    tokenizer: Path | None = None,
    *,
    vocab_size: int = 4096,
    json_key: str = "text",
    seed: int = 1234,
    max_bytes: int | None = None,
    bos: bool | None = None,
) -> DatasetSummary:
    """Write an indexed dataset and its tokenizer to `out`, all of it or nothing.

    Args:
        out: A directory that does not exist yet, or is empty.
        inputs: Files and directories (read recursively, hidden entries left out); None is Python's standard library.
        tokenizer: Directory with a Hugging Face tokenizer; None trains a byte-level BPE on the input.
        vocab_size: Size of the trained vocabulary, EOD included; smaller where the text has too few merges.
        json_key: The field of a JSONL line that holds the text.
        seed: Seed of the document shuffle.
        max_bytes: Stop with the document that reaches this many bytes of text; None takes all.
        bos: Whether each document begins with the tokenizer's BOS token; None does as the tokenizer itself does with a
            text (Llama, Gemma, Mistral begin so, Qwen and those trained here do not).

    Raises:
        DataError: A path is missing, the tokenizer cannot be used, or no document is left.
        ConfigError: `out` is in use, or a size is out of range.
    """
    start = time.perf_counter()
    _check(out, tokenizer, vocab_size, max_bytes)
    documents = find_documents(inputs)
    random.Random(seed).shuffle(documents)
    sources = [str(path) for path in inputs] if inputs is not None else ["the Python standard library"]

    with fresh_directory(out) as partial:
        if tokenizer is None:
            sample = min(max_bytes or TOKENIZER_SAMPLE_BYTES, TOKENIZER_SAMPLE_BYTES)
            _train_tokenizer(partial / "tokenizer", texts_of(documents, json_key, sample), vocab_size)
            encoder = _load_tokenizer(partial / "tokenizer")
        else:
            encoder = _load_tokenizer(tokenizer)
            encoder.save_pretrained(partial / "tokenizer")
        begins = _begins_with_bos(encoder) if bos is None else bos
        if begins and encoder.bos_token_id is None:
            raise ConfigError(
                "the tokenizer has no token that begins a text", got="--bos",
                legal='--no-bos, or a tokenizer with "bos_token"',
            )  # fmt: skip
        skipped: Counter[str] = Counter()
        texts = texts_of(documents, json_key, max_bytes, skipped)
        total = min(sum(size_of(document) for document in documents), max_bytes or sys.maxsize)
        count, tokens, size = _write_indexed(partial / "text_document", texts, encoder, begins, total)
        if not count:
            raise DataError(
                "the input has no text",
                got=f"{len(documents)} documents in {', '.join(sources)}; skipped: {dict(skipped) or 'none'}",
                legal=f"UTF-8 files that are not empty, or *.jsonl with the text under {json_key!r} (--json-key)",
            )
        divisor, padded = vocab_divisor(len(encoder))
        summary = DatasetSummary(
            out=out,
            inputs=sources,
            documents=count,
            tokens=tokens,
            bytes=size,
            bytes_per_token=size / tokens,
            skipped=dict(sorted(skipped.items())),
            vocab_size=len(encoder),
            padded_vocab_size=padded,
            vocab_divisor=divisor,
            tokenizer="trained" if tokenizer is None else "given",
            bos=begins,
            seed=seed,
            bin_sha256=_sha256(partial / "text_document.bin"),
            seconds=time.perf_counter() - start,
        )
        manifest = {key: value for key, value in asdict(summary).items() if key not in ("out", "seconds")}
        manifest["tokenizer_fingerprint"] = fingerprint(partial / "tokenizer")
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        write_rest(partial)
    return summary


def vocab_divisor(vocab_size: int) -> tuple[int, int]:
    """`--make-vocab-size-divisible-by` and the padded vocabulary it gives, the same at every tensor-parallel size.

    Megatron pads to a multiple of `divisor * TP`, so its default of 128 makes a checkpoint's embedding depend on TP.
    With `divisor = ceil(vocab / ways)` the padded vocabulary is `ways * divisor` for every TP that divides `ways`,
    as long as `vocab > (ways - TP) * divisor`, and the padding is fewer than `ways` rows.  `ways` is 64, or for a
    vocabulary of a few hundred the largest power of two that works.
    """
    assert vocab_size > 0
    ways = 64
    while (ways - 1) * math.ceil(vocab_size / ways) >= vocab_size:
        ways //= 2
    divisor = math.ceil(vocab_size / ways)
    return divisor, ways * divisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megatron-ext data`."""
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--out", type=Path, metavar="DIR", help="where the dataset goes: new, or empty")
    job.add_argument("--verify", type=Path, metavar="DIR", help="compare a dataset with its manifest, byte for byte")
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE_OR_DIR",
        help="text, source files or JSONL; default: the running Python's standard library",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer; default: train a BPE")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="of the trained BPE (%(default)s)")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="text field of a JSONL line (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the document shuffle (%(default)s)")
    own = "whether documents begin with the tokenizer's BOS token; default: as the tokenizer's own texts do"
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=None, help=own)
    parser.add_argument("--max-bytes", type=int, metavar="N", help="stop after about N bytes of text")


def main(args: argparse.Namespace) -> None:
    """Run `megatron-ext data`: build, then print what was built and the flags to pass on; or verify."""
    if args.verify is not None:
        print(f"{args.verify}: {verify(args.verify)['tokens']:,} tokens, as they were written")
        return
    summary = build_dataset(
        args.out,
        args.input,
        args.tokenizer,
        vocab_size=args.vocab_size,
        json_key=args.json_key,
        seed=args.seed,
        max_bytes=args.max_bytes,
        bos=args.bos,
    )
    skipped = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.items()) or "none"
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, {summary.bytes / 1e6:.1f} MB of text "
        f"({summary.bytes_per_token:.2f} bytes per token), in {summary.seconds:.1f} s; skipped: {skipped}\n"
        f"tokenizer: {summary.tokenizer}, {summary.vocab_size:,} tokens, {summary.padded_vocab_size:,} when padded; "
        f"documents begin with {'its BOS token' if summary.bos else 'no special token'}\n"
        f"pass on:\n  {shlex.join(summary.flags)}"
    )


def _check(out: Path, tokenizer: Path | None, vocab_size: int, max_bytes: int | None) -> None:
    """What can be refused before a byte is read."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        legal = "a directory that is new or empty"
        raise ConfigError("the output exists, and nothing is overwritten", got=f"--out {out}", legal=legal)
    check_writable(out, "--out")
    if tokenizer is not None and not tokenizer.is_dir():
        raise DataError(
            "no such tokenizer directory", got=f"--tokenizer {tokenizer}", legal="a directory with a tokenizer.json"
        )
    if tokenizer is None and vocab_size < 257:
        raise ConfigError(
            "the vocabulary is too small", got=f"--vocab-size {vocab_size}", legal="at least 257: 256 bytes and the EOD"
        )
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError("nothing would be read", got=f"--max-bytes {max_bytes}", legal="at least 1")


def _train_tokenizer(path: Path, texts: Iterator[str], vocab_size: int) -> None:
    """Train a byte-level BPE, whose last token is the EOD, and save it for `AutoTokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(batches(texts, len, BATCH_CHARACTERS), trainer)
    tokenizer.add_special_tokens([EOD])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' own "no limit"
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _load_tokenizer(path: Path) -> Any:
    """The tokenizer as Megatron's `HuggingFaceTokenizer` will see it: fast, and with an EOD."""
    from transformers import AutoTokenizer

    platform.silence_warnings()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever the first broken file makes them raise
        raise DataError("the tokenizer cannot be loaded", got=f"--tokenizer {path}: {error}") from error
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is not a fast one", got=f"--tokenizer {path}", legal="one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-document token",
            got=f"--tokenizer {path}",
            legal='"eos_token" in its tokenizer_config.json',
        )
    return tokenizer


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _write_indexed(
    prefix: Path, texts: Iterator[str], tokenizer: Any, bos: bool, total_bytes: int
) -> tuple[int, int, int]:
    """Encode `texts` to `prefix`.bin and .idx; returns documents, tokens, bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what megatron says about absent GPU packages does not matter here
        import torch

        platform.silence_warnings()
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # a text that spells a special token stays text
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    first = [tokenizer.bos_token_id] if bos else []
    documents = tokens = size = 0
    with Progress("tokenizing", total_bytes, unit="bytes") as shown:
        for batch in batches(texts, len, BATCH_CHARACTERS):
            for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
                ids = torch.tensor([*first, *encoding.ids, tokenizer.eos_token_id])
                builder.add_item(ids)
                builder.end_document()
                documents += 1
                tokens += len(ids)
            size += sum(len(text.encode()) for text in batch)
            shown.update(size, note=f"{tokens:,} tokens")
    builder.finalize(f"{prefix}.idx")
    return documents, tokens, size


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
