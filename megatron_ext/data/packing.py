"""Data whose samples stay the same however often they are read, as a cache of a teacher needs them.

Megatron packs documents into sequences anew when the number of epochs or the seed changes: other sequences, of which a
cache knows nothing. Here the documents are packed once, for one pass, by the cache's seed; further epochs are the same
sequences in another order, drawn by the run's own seed. The first epoch of a run with the cache's seed is in
Megatron's own order: the very batches that the run would have with a live teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ext.data.batch import build, dataset_settings


@dataclass
class PassConfig(GPTDatasetConfig):
    """`random_seed` packs the documents, `order_seed` orders the sequences of each epoch."""

    order_seed: int = 0


class PassDataset(GPTDataset):
    """The sequences of one pass over a split, as often as it takes to give as many as were asked for.

    What comes before does not change when more are asked for, so a run may be prolonged.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        wanted, self.num_samples = self.num_samples, None
        documents, samples, shuffled = super()._build_document_sample_shuffle_indices()
        self.num_samples = wanted
        if wanted is not None:
            config: Any = self.config
            seed = config.order_seed
            first = shuffled if seed == config.random_seed else None
            shuffled = epochs(len(shuffled), wanted, seed, first)
        return documents, samples, shuffled

    def __len__(self) -> int:
        return len(self.shuffle_index)


def epochs(size: int, wanted: int, seed: int, first: np.ndarray | None = None) -> np.ndarray:
    """The numbers below `size` in one random order after another, until there are `wanted` of them or more.

    Args:
        size: Sequences of a pass.
        wanted: Sequences asked for.
        seed: Of the orders.
        first: The first order, if it is given.
    """
    count = max(1, -(-wanted // max(size, 1)))
    orders = [np.random.default_rng((seed, epoch)).permutation(size).astype(np.uint32) for epoch in range(count)]
    return np.concatenate(orders if first is None else [first.astype(np.uint32), *orders[1:]])


def replayed(args: Any, seed: int) -> Callable[..., Any]:
    """Megatron's dataset provider for training on the sequences of one pass, packed by `seed`.

    There is no test set: it is not part of a cache.

    Args:
        args: Megatron's flags; their seed orders the sequences.
        seed: Packs the documents.
    """

    def provide(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
        settings = dataset_settings(args)
        settings.update(random_seed=seed, order_seed=args.seed)
        config = PassConfig(**settings)
        train, validation, _ = build(PassDataset, config, num_samples, vp_stage)
        return train, validation, None

    provide.is_distributed = True  # type: ignore[attr-defined] - Megatron's mark: call it on every rank
    return provide


def single_pass(args: Any, seed: int, vp_stage: int | None = None) -> list[Any]:
    """All sequences of the training and of the validation split, each once, whatever the weights of a blend.

    Empty on ranks that read no data. A collective of all ranks.

    Args:
        args: Megatron's flags.
        seed: Packs the documents.
        vp_stage: Virtual pipeline stage that asks.
    """
    settings = dataset_settings(args)
    settings["random_seed"] = seed
    config = PassConfig(**settings)
    train, validation, _ = build(PassDataset, config, (None, None, 0), vp_stage)
    return [split for split in (train, validation) if split is not None and len(split)]
