"""`--distill-cache-write`: one forward pass of a teacher over the data, and its likeliest next tokens on disk."""

import dataclasses
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from megatron_ext.checkpoint.outputs import hold_run
from megatron_ext.checkpoint.ranks import gather
from megatron_ext.data.sample_id import hash_samples, to_hex
from megatron_ext.distillation.logit_cache.check import Writing
from megatron_ext.distillation.logit_cache.manifest import MANIFEST, Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader, CacheWriter
from megatron_ext.errors import CheckpointError, ConfigError, DataError, MegatronExtError
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.reports.progress import Progress
from megatron_ext.training import signals
from megatron_ext.training.job import RunConfig

if TYPE_CHECKING:
    from megatron_ext.data.schema import BatchSchema


@torch.no_grad()
def write(run: RunConfig, writing: Writing) -> None:
    """Store one pass over the training and the validation split; what is there already is not computed again.

    SIGTERM and Ctrl-C let the step end; what was computed is stored, as it is when something goes wrong.

    Raises:
        ConfigError: The disk has no room for it.
        CheckpointError: The teacher's logits are not finite.
        DataError: The disk takes no more, or does not give back what was stored.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model

    from megatron_ext.data.batch import text_batch
    from megatron_ext.models.module_builder import read_weights
    from megatron_ext.training.forward import build_model, forward_pass, start

    args, manifest, directory, known = run.args, writing.manifest, writing.directory, writing.known
    if args.rank == 0:
        hold_run(directory, (MANIFEST, "*.safetensors"))
    start(run)
    stages = range(args.virtual_pipeline_model_parallel_size or 1)
    schema = text_batch(args.seq_length, args.padded_vocab_size, identified=True)
    shares = [_Share(args, schema, manifest.seed, stage, known) for stage in stages]
    total, missing, most = _sizes(shares)
    with _all_or_none():
        if args.rank == 0:
            _announce(writing, total, missing)
            directory.mkdir(parents=True, exist_ok=True)
            manifest.write(directory)
    model = build_model(run)
    read_weights(unwrap_model(model), writing.teacher.step)
    micro_batches, shape = get_num_microbatches(), (args.micro_batch_size, args.seq_length)
    steps = -(-most // (args.micro_batch_size * micro_batches))
    iterators: list[Any] = [
        share.batches(args.micro_batch_size, steps * micro_batches, args.num_workers) for share in shares
    ]
    stopped = False
    signals.finish_on_interrupt(args)
    with _all_or_none(), CacheWriter(directory, manifest, known) as writer, Progress("storing", missing) as shown:
        stored = _Stored(writer, manifest, len(shares[-1].missing) if _writes() else 0)
        for step in range(steps):
            forward_pass(partial(_forward_step, schema, stored=stored), model, iterators, micro_batches, shape)
            wrong, asked = _anywhere(stored.problem is not None, signals.requested(args))
            shown.update(missing * (step + 1) // steps)
            stopped = asked and step + 1 < steps
            if wrong or stopped:
                break
        if stored.problem is not None:
            raise stored.problem
    with _all_or_none():
        _finish(run, writing, stored, stopped)
    dist.destroy_process_group()


def _finish(run: RunConfig, writing: Writing, stored: "_Stored", stopped: bool) -> None:
    """Look whether the disk has all that it was given, and say in the manifest that the cache is whole.

    Raises:
        DataError: It has not.
    """
    directory, manifest = writing.directory, writing.manifest
    held = CacheReader(directory, manifest).known()
    lost = len(stored.writer.known - held) + (0 if stopped else stored.left)
    if lost:
        raise DataError(
            "the cache holds less than was computed", got=f"{lost:,} sequences are not in {directory}",
            legal="the same command again: it computes what is missing",
        )  # fmt: skip
    if run.args.rank == 0:
        if not stopped:
            shards = sorted(path.name for path in directory.glob("*.safetensors"))
            dataclasses.replace(manifest, sequences=len(held), shards=shards).write(directory)
        more = "; stopped: the same command goes on from here" if stopped else ""
        print(f"{directory} holds {len(held):,} sequences{more}", flush=True)


def _writes() -> bool:
    """Whether this rank has the likeliest entries of its data-parallel rank's sequences."""
    from megatron.core import mpu

    first = mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0
    return first and mpu.is_pipeline_last_stage()


@contextmanager
def _all_or_none() -> Iterator[None]:
    """End the block on all ranks, or raise the first rank's error on all of them, which end it before they do.

    The process group is gone then, so that one of them says it. A collective.
    """
    problem: MegatronExtError | None = None
    try:
        yield
    except MegatronExtError as error:
        problem = error
    told = next((other for other in gather(problem) if other is not None), None)
    if told is not None:
        dist.destroy_process_group()
        raise told


def _anywhere(*told: bool) -> list[bool]:
    """For each of these whether any rank says so. A collective."""
    flags = torch.tensor(told, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


class _Stored:
    """What becomes of this rank's micro-batches on the last stage.

    Attributes:
        writer: Where they go.
        manifest: What is stored of them.
        left: Sequences that are still to come; after them, batches are filled with what is stored already.
        problem: Why no more may be stored. The ranks meet in every step, so it waits for its end.
    """

    def __init__(self, writer: CacheWriter, manifest: Manifest, left: int) -> None:
        self.writer, self.manifest, self.left = writer, manifest, left
        self.problem: MegatronExtError | None = None

    def add(self, sample_id: Int[Tensor, "b 2"], kept: TopK, finite: Bool[Tensor, " b"]) -> None:
        """Store a micro-batch, but for samples that only fill it and those whose logits are not finite.

        Args:
            sample_id: Their identities.
            kept: The entries of their tokens, in the order (s, b).
            finite: Whether the logits of all of their tokens were.
        """
        here = torch.arange(len(sample_id), device=finite.device) < self.left
        if not finite.all():
            self.problem = self.problem or CheckpointError(
                "the teacher's logits are not finite",
                got="sample " + ", ".join(to_hex(each) for each in sample_id[~finite]),
                legal="a teacher whose weights and activations are finite on these data",
            )
        b = len(sample_id)
        self.left -= int(here.sum())
        wanted = (here & finite).nonzero().flatten()
        if not len(wanted):
            return
        parts = [x.unflatten(0, (-1, b))[:, wanted].flatten(0, 1) for x in (kept.index, kept.log_q, kept.log_rest)]
        try:
            self.writer.add(sample_id[wanted], TopK(*parts))
        except MegatronExtError as error:
            self.problem = self.problem or error


class _Samples(ConcatDataset):
    """Several datasets as one, whose samples have the same keys: those of a batch."""

    def __init__(self, datasets: Iterable[Any], schema: "BatchSchema") -> None:
        super().__init__(datasets)
        self._names = schema.fields

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        return {name: value for name, value in sample.items() if name in self._names}


class _Share:
    """This data-parallel rank's part of the samples, for one chunk of the model; nothing where none are read.

    Attributes:
        total: Samples of all ranks.
        missing: Numbers of this rank's samples that are not known.
    """

    def __init__(self, args: Namespace, schema: "BatchSchema", seed: int, stage: int, known: set[bytes]) -> None:
        from megatron.core import mpu

        from megatron_ext.data.packing import single_pass

        splits = single_pass(args, seed, stage)
        self._data = _Samples(splits, schema) if splits else None
        self.total = len(self._data) if self._data is not None else 0
        own = range(mpu.get_data_parallel_rank(), self.total, mpu.get_data_parallel_world_size())
        self.missing: list[int] = [number for number in own if not known or self._identity(number) not in known]

    def batches(self, size: int, count: int, workers: int) -> Iterator[dict[str, Any]] | None:
        """The missing samples as `count` batches; where they do not fill them, one again and again."""
        if self._data is None:
            return None
        filler = self.missing[0] if self.missing else 0
        padded = self.missing + [filler] * (size * count - len(self.missing))
        batches = [padded[first : first + size] for first in range(0, size * count, size)]
        return iter(DataLoader(self._data, batch_sampler=batches, num_workers=workers, pin_memory=True))

    def _identity(self, number: int) -> bytes:
        assert self._data is not None
        sample = self._data[number]
        return hash_samples(sample["tokens"].unsqueeze(0), sample["labels"].unsqueeze(0)).numpy().tobytes()


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
    print(f"what {writing.teacher.step.absolute()} says")
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


def _forward_step(
    schema: "BatchSchema", data: Iterator[dict[str, Any]], model: torch.nn.Module, stored: _Stored
) -> tuple[Tensor, None]:
    """The teacher's forward pass over a micro-batch; on the last stage its likeliest entries go to the writer."""
    from megatron.core.num_microbatches_calculator import get_micro_batch_size
    from megatron.core.utils import unwrap_model

    from megatron_ext.lm_head.hidden_states import head, hidden_states
    from megatron_ext.lm_head.top_k import teacher_top_k
    from megatron_ext.lm_head.vocab_parallel import VocabParallel

    chunk: Any = unwrap_model(model)
    batch, manifest = schema.read(data, get_micro_batch_size(), chunk.vp_stage), stored.manifest
    states = hidden_states(chunk, batch.get("tokens"), batch.get("position_ids"), None)
    if not chunk.post_process:
        return states, None
    own, groups, sample_id = head(chunk, states), chunk.pg_collection, batch["sample_id"]
    vocabulary = VocabParallel(own.weight.shape[0], manifest.vocabulary, groups.tp)
    found = teacher_top_k(own, vocabulary, manifest.k, manifest.temperature)
    kept = _whole(found.kept, len(sample_id), groups.cp)
    finite = found.finite.view(-1, len(sample_id)).all(0).int()
    if groups.cp.size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=groups.cp)
    if groups.tp.rank() == 0 and groups.cp.rank() == 0:
        stored.add(sample_id, kept, finite.bool())
    return torch.zeros((), device=states.device), None


def _whole(kept: TopK, b: int, group: Any) -> TopK:
    """The entries of whole sequences, in the order (s, b), from the parts of the context-parallel ranks."""
    from megatron_ext.platform.context_parallel import zigzag_join

    if group.size() == 1:
        return kept

    def whole(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return zigzag_join(torch.cat(parts).unflatten(0, (-1, b)), group.size()).flatten(0, 1)

    return TopK(whole(kept.index), whole(kept.log_q), whole(kept.log_rest))
