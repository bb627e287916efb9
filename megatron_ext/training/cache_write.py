"""`--distill-cache-write`: one forward pass of a teacher over the data, and its likeliest next tokens on disk."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from megatron_ext.distillation.cache import Manifest, Reader, Writer
from megatron_ext.distillation.divergences import TopK
from megatron_ext.distillation.identity import identify, name
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.training.cache import Writing
from megatron_ext.training.launch import Launch

REPORT_SECONDS = 5.0


@torch.no_grad()
def write(launch: Launch, writing: Writing) -> None:
    """Store one pass over the training and the validation split; what is there already is not computed again.

    Raises:
        ConfigError: The disk has no room for it.
        CheckpointError: The teacher's logits are not finite.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import unwrap_model

    from megatron_ext.distillation.beside import load
    from megatron_ext.training.evaluate import build_model, start

    args, manifest, directory = launch.args, writing.manifest, writing.directory
    start(launch)
    known = Reader(directory).known()
    stages = range(args.virtual_pipeline_model_parallel_size or 1)
    shares = [_Share(manifest.seed, stage, known) for stage in stages]
    total, missing, most = _sizes(shares)
    if args.rank == 0:
        _announce(writing, total, missing)
        directory.mkdir(parents=True, exist_ok=True)
        manifest.write(directory)
    model = build_model(launch)
    load(unwrap_model(model), writing.teacher)
    run, micro_batches = get_forward_backward_func(), get_num_microbatches()
    steps = -(-most // (args.micro_batch_size * micro_batches))
    iterators: list[Any] = [
        share.batches(args.micro_batch_size, steps * micro_batches, args.num_workers) for share in shares
    ]
    progress = _progress(args.rank, missing, args.seq_length)
    with Writer(directory, manifest, known) as writer:
        for step in range(steps):
            run(
                forward_step_func=partial(_forward_step, writer=writer, manifest=manifest),
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=micro_batches,
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
            )
            progress((step + 1) / steps)
    dist.barrier()
    if args.rank == 0:
        sequences = len(Reader(directory).known())
        dataclasses.replace(manifest, sequences=sequences).write(directory)
        print(f"{directory} holds {sequences:,} sequences", flush=True)
    dist.barrier()
    dist.destroy_process_group()


class _Samples(ConcatDataset):
    """Several datasets as one, whose samples have the same keys."""

    def __getitem__(self, idx: int) -> dict[str, Any]:
        from megatron_ext.training.data import KEYS

        sample: dict[str, Any] = super().__getitem__(idx)
        return {key: value for key, value in sample.items() if key in KEYS}


class _Share:
    """This data-parallel rank's part of the samples, for one chunk of the model; nothing where none are read.

    Attributes:
        total: Samples of all ranks.
        missing: Numbers of this rank's samples that are not known.
    """

    def __init__(self, seed: int, stage: int, known: set[bytes]) -> None:
        from megatron.core import mpu

        from megatron_ext.training.passes import one_pass

        splits = one_pass(seed, stage)
        self._data = _Samples(splits) if splits else None
        self.total = len(self._data) if self._data is not None else 0
        own = range(mpu.get_data_parallel_rank(), self.total, mpu.get_data_parallel_world_size())
        self.missing = [number for number in own if not known or self._identity(number) not in known]

    def batches(self, size: int, count: int, workers: int) -> Iterator[dict[str, Any]] | None:
        """The missing samples as `count` batches; where they do not fill them, some again."""
        if self._data is None:
            return None
        filler = self.missing[0] if self.missing else 0
        padded = self.missing + [filler] * (size * count - len(self.missing))
        batches = [padded[first : first + size] for first in range(0, size * count, size)]
        return iter(DataLoader(self._data, batch_sampler=batches, num_workers=workers, pin_memory=True))

    def _identity(self, number: int) -> bytes:
        assert self._data is not None
        sample = self._data[number]
        return identify(sample["tokens"].unsqueeze(0), sample["labels"].unsqueeze(0)).numpy().tobytes()


def _sizes(shares: list[_Share]) -> tuple[int, int, int]:
    """Samples in all, those that are missing, and the most that one data-parallel rank misses; on all ranks alike."""
    from megatron.core import mpu

    sizes = torch.zeros(1 + mpu.get_data_parallel_world_size(), dtype=torch.int64)
    sizes[0] = max(share.total for share in shares)
    sizes[1 + mpu.get_data_parallel_rank()] = max(len(share.missing) for share in shares)
    sizes = sizes.to(torch.cuda.current_device())
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    return int(sizes[0]), int(sizes[1:].sum()), int(sizes[1:].max())


def _announce(writing: Writing, total: int, missing: int) -> None:
    """Say what will be written, and whether there is room for it."""
    own = writing.manifest
    entries = f"{own.k:,} of {own.vocabulary:,} entries and the rest"
    print(f"{entries} per token, {own.dtype}, temperature {own.temperature:g}: {own.bytes_per_token:,} bytes per token")
    size = own.bytes_per_token * own.sequence_length
    tokens = f"{total:,} sequences of {own.sequence_length:,} tokens, {_bytes(total * size)}"
    print(f"{tokens}; {total - missing:,} are stored already, {_bytes(missing * size)} are missing", flush=True)
    place = next(path for path in (writing.directory, *writing.directory.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < missing * size:
        raise ConfigError(
            "the disk has no room for the cache", got=f"{_bytes(free)} at {place}",
            legal=f"{_bytes(missing * size)}; --distill-top-k, --distill-cache-dtype and --split make it smaller",
        )  # fmt: skip


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _progress(rank: int, missing: int, sequence_length: int) -> Callable[[float], None]:
    """Prints a line on rank 0, but not more often than every few seconds."""
    first = last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if rank == 0 and (now - last > REPORT_SECONDS or share == 1):
            last, seconds = now, now - first
            speed, left = share * missing * sequence_length / seconds, seconds / share * (1 - share)
            line = (
                f"{int(share * missing):,} of {missing:,} sequences, {speed:,.0f} tokens/s, {left / 60:,.1f} min left"
            )
            print(line, flush=True)

    return progress


def _forward_step(
    data: Iterator[dict[str, Any]], model: torch.nn.Module, writer: Writer, manifest: Manifest
) -> tuple[Tensor, None]:
    """The teacher's forward pass over a micro-batch; on the last stage its likeliest entries go to the writer."""
    from megatron.core.utils import unwrap_model

    from megatron_ext.distillation.likeliest import likeliest
    from megatron_ext.distillation.model import head
    from megatron_ext.models.hidden import hidden_states
    from megatron_ext.models.vocabulary import Vocabulary
    from megatron_ext.training.data import get_identified_batch

    chunk: Any = unwrap_model(model)
    batch = get_identified_batch(data, chunk.vp_stage)
    states = hidden_states(chunk, batch["tokens"], batch["position_ids"], batch["attention_mask"])
    if not chunk.post_process:
        return states, None
    own, groups, sample_id = head(chunk, states), chunk.pg_collection, batch["sample_id"]
    vocabulary = Vocabulary(own.weight.shape[0], manifest.vocabulary, groups.tp)
    found = likeliest(own, vocabulary, manifest.k, manifest.temperature)
    wrong = (~found.finite).view(-1, len(sample_id)).any(0)
    if wrong.any():
        raise CheckpointError(
            "the teacher's logits are not finite", got="sample " + ", ".join(name(each) for each in sample_id[wrong]),
            legal="a teacher whose weights and activations are finite on these data",
        )  # fmt: skip
    kept = _whole(found.kept, len(sample_id), manifest.sequence_length, groups.cp)
    if groups.tp.rank() == 0 and groups.cp.rank() == 0:
        writer.add(sample_id, kept)
    return torch.zeros((), device=states.device), None


def _whole(kept: TopK, b: int, sequence_length: int, group: Any) -> TopK:
    """The entries of whole sequences, in the order (s, b), from the parts of the context-parallel ranks."""
    from megatron_ext.distillation.cached import positions

    if group.size() == 1:
        return kept

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    own: Int[Tensor, " s"] = positions(sequence_length, group).to(kept.index.device)
    order = gather(own).argsort()
    whole = (gather(x.view(len(own), b, *x.shape[1:]))[order] for x in (kept.index, kept.log_q, kept.log_rest))
    return TopK(*(x.flatten(0, 1) for x in whole))
