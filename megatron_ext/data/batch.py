"""Data for the language model: Megatron's datasets, and the batch that each rank needs of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_ext.data.sample_id import hash_samples
from megatron_ext.errors import DataError

# The keys that Megatron's batch functions expect; those of packed sequences stay None.
KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "attention_mask",
    "position_ids",
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "local_cp_size",
    "max_seqlen",
)


def build_datasets(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
    """Train, validation and test `GPTDataset` for Megatron's `--data-path`, `--split` or `--*-data-path` flags.

    Args:
        num_samples: Sequences wanted of each of the three; None for one pass over the split.
        vp_stage: Virtual pipeline stage that asks.
    """
    args: Any = get_args()
    config = GPTDatasetConfig(**dataset_settings(args))
    if num_samples[1] == 0 and args.eval_iters and not args.skip_train:
        # With --start-eval-at-iter past the end Megatron plans no validation, and validates after the last step.
        num_samples = (num_samples[0], args.eval_iters * args.global_batch_size, num_samples[2])
    return build(MockGPTDataset if args.mock_data else GPTDataset, config, num_samples, vp_stage)


build_datasets.is_distributed = True  # type: ignore[attr-defined] - Megatron's mark: call it on every rank


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


def get_batch(data: Iterator[dict[str, Any]] | None, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next micro-batch: `tokens`, `labels`, `loss_mask`, `position_ids`, each (b, s/CP).

    All None on the middle pipeline stages, which need none of it.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    args: Any = get_args()
    tp_group: Any = mpu.get_tensor_model_parallel_group()
    cp_group: Any = mpu.get_context_parallel_group()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data is not None
        sample = next(data)
        _check_ids(sample, args.padded_vocab_size)
        batch = {k: sample[k].cuda(non_blocking=True) if sample.get(k) is not None else None for k in KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=tp_group,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)


def _check_ids(sample: dict[str, Any], rows: int) -> None:
    """Check that every token has a row of the embedding, while they are on the host.

    Split over tensor-parallel ranks, an embedding takes any number; on a GPU it ends in an assertion of the device.

    Raises:
        DataError: One has not.
    """
    largest = max(int(sample["tokens"].max()), int(sample["labels"].max()))
    if largest >= rows:
        raise DataError("the data have a token that the model does not", got=largest, legal=f"0 to {rows - 1:,}")


def get_identified_batch(data: Iterator[dict[str, Any]] | None, vp_stage: int | None) -> dict[str, Any]:
    """`get_batch`, and `sample_id` (b, 2): which sequences these are, the same on all ranks of the last stage."""
    reads = is_first_or_last_pipeline_stage(vp_stage)
    sample = next(data) if data is not None and reads and mpu.get_tensor_model_parallel_rank() == 0 else None
    batch: dict[str, Any] = get_batch(iter([sample]) if sample is not None else None, vp_stage)
    batch["sample_id"] = None
    if reads and mpu.is_pipeline_last_stage():
        args: Any = get_args()
        own = torch.empty(args.micro_batch_size, 2, dtype=torch.int64)
        if sample is not None:
            own = hash_samples(sample["tokens"], sample["labels"])
        own = own.cuda(non_blocking=True)
        group: Any = mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(own, mpu.get_tensor_model_parallel_src_rank(), group)
        batch["sample_id"] = own
    return batch
