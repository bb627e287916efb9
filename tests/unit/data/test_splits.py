"""A split without a sequence is refused before anything starts, in words that say what helps."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.splits import check_splits, check_vocabulary
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported


def write(prefix: Path, *lengths: int) -> str:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def arguments(**given: Any) -> Namespace:
    paths = dict.fromkeys(
        ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path",
         "per_split_data_args_path", "split")
    )  # fmt: skip
    rest = {"mock_data": False, "skip_train": False, "full_validation": False, "eval_iters": 2}
    return Namespace(**{**paths, **rest, "seq_length": 8, "global_batch_size": 4, **given})


def refusal(args: Namespace, measured: int = 0) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        check_splits(args, measured)
    return str(caught.value)


@pytest.fixture
def two(tmp_path: Path) -> str:
    """Two documents, of 40 and 50 tokens."""
    return write(tmp_path / "two", 40, 50)


def test_an_empty_split_that_is_read(two: str) -> None:
    said = refusal(arguments(data_path=[two], split="95,5,0"))
    assert "the validation split has no sequence of 8 tokens" in said
    assert "two: 0 of 2 documents, 0 tokens in --split 95,5,0" in said
    assert "--eval-iters 0 to train without validation, another --split" in said
    assert "there is no validation data" in refusal(arguments(data_path=[two], split="100,0,0"))
    assert "the test split has no" in refusal(arguments(data_path=[two], split="50,49,1"))
    assert "the training split has no" in refusal(arguments(data_path=[two], split="5,95,0"))
    assert "there is no training data" in refusal(arguments(data_path=[two], split="0,100,0", eval_iters=0))


def test_an_empty_split_that_is_not_read(two: str) -> None:
    for split in ("95,5,0", "100,0,0", "95,3,2"):
        check_splits(arguments(data_path=[two], split=split, eval_iters=0), 0)
    check_splits(arguments(data_path=[two], split="50,50,0"), 0)
    check_splits(arguments(data_path=[two], split="95,5,0", skip_train=True), 0)
    check_splits(arguments(data_path=[two], split="0,1,0", skip_train=True), 1)
    check_splits(arguments(mock_data=True), 0)


def test_a_sequence_needs_its_last_label(tmp_path: Path) -> None:
    check_splits(arguments(data_path=[write(tmp_path / "a", 40, 9)], split="50,50,0"), 0)
    said = refusal(arguments(data_path=[write(tmp_path / "b", 40, 8)], split="50,50,0"))
    assert "b: 1 of 2 documents, 8 tokens" in said


def test_what_is_measured_in_one_pass_needs_a_whole_batch(tmp_path: Path, two: str) -> None:
    small = write(tmp_path / "small", 32)
    measured = {"split": "0,1,0", "skip_train": True}
    assert "validation split has no batch of 4 sequences" in refusal(arguments(data_path=[small], **measured), 1)
    check_splits(arguments(data_path=[small, two, two], **measured), 1)


def test_every_part_of_a_blend(tmp_path: Path, two: str) -> None:
    empty = write(tmp_path / "empty")
    said = refusal(arguments(train_data_path=["0.5", two, "0.5", empty], valid_data_path=[two]))
    assert "the training split" in said
    assert "empty: 0 of 0 documents" in said
    assert "there is no validation data" in refusal(arguments(train_data_path=[two]))
    check_splits(arguments(train_data_path=[two], eval_iters=0), 0)


def test_data_that_is_not_said_or_said_twice(tmp_path: Path, two: str) -> None:
    assert "no data given" in refusal(arguments())
    assert "--data-path needs --split" in refusal(arguments(data_path=[two]))
    assert "--split does not go with" in refusal(arguments(train_data_path=[two], split="1,1,0"))
    for wrong in ("1,2,3,4", "a,b", "0,0,0", "-1,2", "nan,1", "inf,1,0", "", "1,,1"):
        assert f"--split\n  got:   {wrong}\n" in refusal(arguments(data_path=[two], split=wrong))
    assert "list of data cannot be read" in refusal(arguments(data_args_path=str(tmp_path / "none")))
    (tmp_path / "list").write_text("nowhere")
    assert "--data-args-path: no such data" in refusal(arguments(data_args_path=str(tmp_path / "list"), split="1,0,0"))


def test_data_that_was_cut_off(two: str) -> None:
    with open(f"{two}.bin", "r+b") as stream:
        stream.truncate(300)
    said = refusal(arguments(data_path=[two], split="100,0,0", eval_iters=0))
    assert "do not belong together" in said
    assert "two.bin: 300 bytes" in said


def test_every_token_needs_a_row(two: str) -> None:
    args = arguments(data_path=[two], split="100,0,0", tokenizer_fingerprint=None)
    check_vocabulary(args, 100, 100)
    with pytest.raises(ConfigError, match=r"(?s)a tokenizer of 101 tokens.*100 tokens at most"):
        check_vocabulary(args, 101, 100)
