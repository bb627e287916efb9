"""What a job reads of its data, checked before anything starts: files that are whole, and splits that are not empty.

Megatron repeats a split until it is long enough; one without a token is repeated for ever.
"""

import re
from argparse import Namespace
from math import inf
from pathlib import Path

from megatron_ext.checkpoint.tokenizer import check_rows
from megatron_ext.data import manifest
from megatron_ext.data.index import Index
from megatron_ext.errors import ConfigError, DataError

SPLITS = ("training", "validation", "test")
PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")


def check_splits(args: Namespace, measured: int) -> None:
    """Check the data that a job with these (Megatron's) arguments reads.

    Args:
        args: Validated.
        measured: The split that the job reads, by its place in `SPLITS`, where it does not train (`--skip-train`).

    Raises:
        ConfigError: No data is given, or it is given in two ways.
        DataError: A file is missing, cut off or of another dataset, or a split that is read has no sequence.
    """
    from megatron.core.datasets.object_storage_utils import is_object_storage_path

    if args.mock_data:
        return
    blends = _blends(args)
    indices: dict[str, Index] = {}
    for flag, prefixes, _ in blends:
        for prefix in prefixes:
            if prefix not in indices and not is_object_storage_path(prefix):
                indices[prefix] = _index(flag, prefix)
    for split in (measured,) if args.skip_train else _read(args, blends):
        flag, prefixes, share = blends[split]
        if share is None or not prefixes:
            raise DataError(
                f"there is no {SPLITS[split]} data", got=f"{flag} {args.split}" if share is None else f"no {flag}",
                legal=_ways_out(split, args),
            )  # fmt: skip
        own = [indices[prefix] for prefix in prefixes if prefix in indices]
        _check_lengths(own, split, share, args)


def check_vocabulary(args: Namespace, vocab_size: int, padded_vocab_size: int) -> None:
    """Check that the model has a row for every token of the tokenizer, and that the data were made with that tokenizer.

    Args:
        args: Validated, with the tokenizer's fingerprint.
        vocab_size: Of the tokenizer.
        padded_vocab_size: Rows of the model's embedding.

    Raises:
        ConfigError, DataError: Says what does not fit.
    """
    check_rows(vocab_size, padded_vocab_size)
    if not args.mock_data:
        for prefix in dict.fromkeys(prefix for _, prefixes, _ in _blends(args) for prefix in prefixes):
            manifest.check(prefix, args.tokenizer_fingerprint, padded_vocab_size)


def _read(args: Namespace, blends: list[tuple[str, list[str], tuple[float, float] | None]]) -> list[int]:
    """The splits that a job which trains reads; the test split, last, only if there is one."""
    validates = args.full_validation or (args.eval_iters or 0) > 0
    tests = validates and blends[2][2] is not None and bool(blends[2][1])
    return [0, *([1] if validates else []), *([2] if tests else [])]


def _blends(args: Namespace) -> list[tuple[str, list[str], tuple[float, float] | None]]:
    """For each split: the flag that says what it is made of, the prefixes, and which part of each (None: no part)."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.training.utils import get_blend_and_blend_per_split

    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise DataError(f"the list of data cannot be read: {error.strerror}", got=error.filename) from error
    if per_split is not None:
        if args.split is not None:
            raise ConfigError(
                "--split does not go with data of its own for each split", got=f"--split {args.split}",
                legal="no --split, or --data-path",
            )  # fmt: skip
        named = args.per_split_data_args_path is None
        flags = ["--" + name.replace("_", "-") if named else "--per-split-data-args-path" for name in PER_SPLIT]
        return [(flag, own[0] if own else [], (0.0, 1.0)) for flag, own in zip(flags, per_split, strict=True)]
    if blend is None:
        raise ConfigError("no data given", legal="--data-path PREFIX, --train-data-path PREFIX ... or --mock-data")
    if args.split is None:
        raise ConfigError("--data-path needs --split", legal="--split 99,1,0: training, validation, test")
    try:
        parts = [float(part) for part in re.split("[,/]", args.split)]
        if not (0 < sum(parts) < inf and min(parts) >= 0):  # NaN neither
            raise ValueError(args.split)
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    except (AssertionError, ValueError) as error:
        legal = "up to three numbers, one of them above 0, such as 99,1,0"
        raise ConfigError("--split", got=args.split, legal=legal) from error
    flag = "--data-path" if args.data_path else "--data-args-path"
    return [(flag if share is not None else "--split", blend[0], share) for share in shares]


def _index(flag: str, prefix: str) -> Index:
    missing = [f"{prefix}{ending}" for ending in (".idx", ".bin") if not Path(f"{prefix}{ending}").is_file()]
    if missing:
        raise DataError(
            f"{flag}: no such data", got=", ".join(missing),
            legal="a prefix made by `megatron-ext data --out DIR`: DIR/text_document",
        )  # fmt: skip
    index = Index.read(prefix)
    index.check_bin()
    return index


def _check_lengths(indices: list[Index], split: int, share: tuple[float, float], args: Namespace) -> None:
    """Each dataset must have a whole sequence in the split, and what is measured in one pass, a whole batch of them."""
    batch = args.global_batch_size if args.skip_train and split == 1 else 1
    sequences = 0
    for index in indices:
        count = len(index.lengths)
        first, stop = (round(border * float(count)) for border in share)  # as Megatron rounds
        tokens = index.tokens(first, stop, batch * args.seq_length + 1)  # the last token has its successor
        own = max(0, tokens - 1) // args.seq_length
        sequences += own
        if not own or (index is indices[-1] and sequences < batch):
            what = f"batch of {batch:,} sequences" if own else f"sequence of {args.seq_length:,} tokens"
            part = f" in --split {args.split}" if args.split else ""
            raise DataError(
                f"the {SPLITS[split]} split has no {what}",
                got=f"{index.prefix}: {stop - first:,} of {count:,} documents, {tokens:,} tokens{part}",
                legal=_ways_out(split, args),
            )  # fmt: skip


def _ways_out(split: int, args: Namespace) -> str:
    other = "another --split" if args.split else "data for it"
    if split == 0 or args.skip_train:
        return f"{other}, or more documents"
    return f"--eval-iters 0 to train without {SPLITS[split]}, {other}, or more documents"
