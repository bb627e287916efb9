"""However often a split is read, the sequences are those of one pass."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported

from megatron_ext.data.packing import epochs  # noqa: E402

LENGTH = 8


def test_every_epoch_is_the_whole_in_another_order() -> None:
    order = epochs(50, 120, seed=3).reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in order)
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[1], order[2])


def test_more_epochs_and_a_given_first_one_change_nothing_else() -> None:
    first = np.arange(50)
    for given in (None, first):
        assert np.array_equal(epochs(50, 10, 3, given), epochs(50, 150, 3, given)[:50])
    assert np.array_equal(epochs(50, 150, 3, first)[:50], first)
    assert np.array_equal(epochs(50, 150, 3, first)[50:], epochs(50, 150, 3)[50:])
    assert not np.array_equal(epochs(50, 50, 3), epochs(50, 50, 4))
    assert len(epochs(0, 5, 3)) == 0


def write_corpus(prefix: Path, start: int) -> Path:
    """Documents of odd lengths, so that packing them in another order gives other sequences."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in (13, 5, 29, 7, 11, 17):
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text", 0)


def settings(*corpora: Path, weights: list[float] | None = None, seed: int = 1, order_seed: int = 1) -> Any:
    from megatron_ext.data.packing import PassConfig

    tokenizer: Any = SimpleNamespace(
        vocab_size=1000, eod=999, pad=998, unique_identifiers="none", special_tokens_dict={}
    )
    return PassConfig(
        random_seed=seed, sequence_length=LENGTH, split="1,0,0", blend=([str(path) for path in corpora], weights),
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, path_to_cache=str(corpora[0].parent / "index"), order_seed=order_seed,
    )  # fmt: skip


def contents(data: Any) -> list[tuple[int, ...]]:
    return [(*data[i]["tokens"].tolist(), int(data[i]["labels"][-1])) for i in range(len(data))]


def sequences(corpus: Path, wanted: int | None, own: bool, seed: int = 1, order_seed: int = 1) -> list[tuple[int, ...]]:
    """The tokens of all sequences, of Megatron's dataset or of `own`."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_ext.data.packing import PassDataset

    config = settings(corpus, seed=seed, order_seed=order_seed)
    kind = PassDataset if own else GPTDataset
    low = IndexedDataset(str(corpus))
    data = kind(low, str(corpus), np.arange(len(low), dtype=np.int32), wanted, Split.train, config)
    return contents(data)


def test_no_epoch_and_no_seed_makes_another_sequence(corpus: Path) -> None:
    """Where Megatron's own dataset has sequences in the third epoch which no cache of one pass knows."""
    stored = sequences(corpus, None, own=True)
    assert stored == sequences(corpus, None, own=False)  # one pass is Megatron's
    size = len(stored)
    for order_seed in (1, 2):
        read = sequences(corpus, 3 * size, own=True, order_seed=order_seed)
        assert len(read) == 3 * size
        for epoch in range(3):
            assert sorted(read[epoch * size : (epoch + 1) * size]) == sorted(stored)
        assert (read[:size] == stored) == (order_seed == 1)
    assert sequences(corpus, size // 2, own=True)[: size // 2] == sequences(corpus, size // 2, own=False)[: size // 2]
    assert not set(sequences(corpus, 3 * size, own=False)) <= set(stored)
    assert not set(sequences(corpus, None, own=True, seed=2)) <= set(stored)


def test_no_blend_makes_another_sequence(tmp_path: Path) -> None:
    """Whatever its weights, and though one of the corpora is read several times."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_ext.data.packing import PassDataset

    corpora = [write_corpus(tmp_path / f"text{start}", start) for start in (0, 500)]
    build: Any = BlendedMegatronDatasetBuilder
    stored, *_ = build(PassDataset, [None] * 3, lambda: True, settings(*corpora)).build()
    size = len(stored)
    blend = settings(*corpora, weights=[0.9, 0.1], seed=1, order_seed=2)
    read, *_ = build(PassDataset, [2 * size, 0, 0], lambda: True, blend).build()
    assert len(read) >= 2 * size
    assert set(contents(read)) <= set(contents(stored))
    first = [content for content in contents(read) if content[0] < 500]
    assert len(first) > 3 * len(set(first))  # several times
