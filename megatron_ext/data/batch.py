"""Data for the language model: Megatron's datasets, and the batch that each rank needs of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_ext.data.sample_id import hash_samples
from megatron_ext.data.schema import BatchSchema, Field
from megatron_ext.errors import DataError


def text_datasets(args: Any) -> Callable[..., Any]:
    """Megatron's dataset provider for its `--data-path`, `--split` or `--*-data-path` flags.

    It makes training, validation and test `GPTDataset`s, of so many sequences each; None is one pass over the split.
    """

    def provide(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
        config = GPTDatasetConfig(**dataset_settings(args))
        if num_samples[1] == 0 and args.eval_iters and not args.skip_train:
            # With --start-eval-at-iter past the end Megatron plans no validation, and validates after the last step.
            num_samples = (num_samples[0], args.eval_iters * args.global_batch_size, num_samples[2])
        return build(MockGPTDataset if args.mock_data else GPTDataset, config, num_samples, vp_stage)

    provide.is_distributed = True  # type: ignore[attr-defined] - Megatron's mark: call it on every rank
    return provide


def dataset_settings(args: Any) -> dict[str, Any]:
    """What Megatron's flags say of the data, as fields of `GPTDatasetConfig`."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": build_tokenizer(args),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
    }


def build(
    dataset: type[GPTDataset], config: GPTDatasetConfig, num_samples: Sequence[int | None], vp_stage: int | None
) -> list[Any]:
    """Three datasets on the ranks that read data, None on the others and where no sequence is wanted.

    A collective of all ranks.

    Raises:
        DataError: The caches of its indices cannot be written.
    """
    _leave_out(config, num_samples)

    def built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    builder: Any = BlendedMegatronDatasetBuilder  # its annotation denies the None that it documents
    try:
        return builder(dataset, list(num_samples), built_here, config).build()
    except Exception as error:  # Megatron's own, without a type
        if not isinstance(cause := error.__cause__, OSError):
            raise
        raise DataError(
            f"the caches of the data's indices cannot be written: {cause.strerror}", got=cause.filename,
            legal="--data-cache-path DIR, a directory that can be written",
        ) from error  # fmt: skip


def _leave_out(config: GPTDatasetConfig, num_samples: Sequence[int | None]) -> None:
    """Take from `config` the splits of which nothing is wanted, and the weights of those that are read once."""
    for split, wanted in enumerate(num_samples):
        # A split of which nothing is wanted may be empty, and Megatron would repeat it for ever.
        if config.blend_per_split is not None:
            own = config.blend_per_split[split]
            if own is not None and not wanted:
                config.blend_per_split[split] = (own[0], None) if wanted is None else None
        elif config.split_matrix is not None and wanted == 0:
            config.split_matrix[split] = None  # type: ignore[call-overload] - Megatron's own mark
    if config.blend is not None and not any(num_samples):
        config.blend = (config.blend[0], None)


def text_batch(length: int, vocabulary: int, identified: bool = False) -> BatchSchema:
    """What a language model's micro-batch is made of; a middle stage of the pipeline needs none of it.

    Args:
        length: Tokens of a sequence.
        vocabulary: Rows of the embedding: every token must have one.
        identified: Whether `sample_id` says which sequences these are.
    """
    tokens = partial(Field, (length,), sequence=0)
    fields = {
        "tokens": tokens(torch.int64, stages="first", below=vocabulary),
        "position_ids": tokens(torch.int64, stages="first"),
        "labels": tokens(torch.int64, stages="last", below=vocabulary),
        "loss_mask": tokens(torch.float32, stages="last"),
    }
    if identified:
        fields["sample_id"] = Field(
            (2,), torch.int64, stages="last", made=lambda batch: hash_samples(batch["tokens"], batch["labels"])
        )
    return BatchSchema(fields)
