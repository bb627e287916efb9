"""Each rank gets its part of a batch: by Megatron's own functions for text, by plain indices for the rest."""

from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.errors import DataError
from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported

from megatron_ext.data import schema  # noqa: E402
from megatron_ext.data.batch import text_batch  # noqa: E402
from megatron_ext.data.sample_id import hash_samples  # noqa: E402
from megatron_ext.data.schema import BatchSchema, Field  # noqa: E402

ROWS, LENGTH, VOCABULARY = 2, 16, 50


def text() -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return {
        "tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (tokens[:, 1:] > 10).float(), "position_ids": torch.arange(LENGTH).repeat(ROWS, 1),
    }  # fmt: skip


def rank_parts(tp: int, cp: int, pp: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's text batch from the schema, and from Megatron."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank

    mpu.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    reads = mpu.get_tensor_model_parallel_rank() == 0
    found = text_batch(LENGTH, VOCABULARY, identified=True).read(iter([text()]) if reads else None, ROWS)
    group: Any = mpu.get_tensor_model_parallel_group()
    expected = get_batch_on_this_tp_rank(
        text() if reads else {},
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(), broadcast_group=group, has_cu_seqlens=False,
        is_hybrid_cp=False, create_attention_mask_in_dataloader=False, cp_size=cp, tp_rank=group.rank(),
        micro_batch_size=ROWS, seq_length=LENGTH, mtp_on_this_rank=False, pipeline_model_parallel_size=pp,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(), is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )  # fmt: skip
    if mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage():
        expected = get_batch_on_this_cp_rank(expected, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    else:
        expected = {}
    return found, {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize(("tp", "cp", "pp"), [(2, 2, 1), (1, 1, 3), (1, 4, 1)], ids=["TP2 CP2", "PP3", "CP4"])
def test_text_is_shared_as_megatron_shares_it(tp: int, cp: int, pp: int) -> None:
    for rank, (found, expected) in enumerate(run_ranks(rank_parts, tp * cp * pp, tp, cp, pp)):
        if rank == tp * cp * pp - 1:  # the last stage knows which sequences they are
            assert found.pop("sample_id").equal(hash_samples(text()["tokens"], text()["labels"]))
        found.pop("sample_id", None)
        assert found.keys() == expected.keys(), rank
        for name, value in expected.items():
            assert found[name].equal(value), (rank, name)
            assert found[name].dtype == value.dtype


BORDERS = [[0, 4, 12, 16], [0, 8, 16, 16]]
PACKED = BatchSchema(
    {
        "borders": Field((None,), torch.int32), "patches": Field((3, None), torch.float32, sequence=1),
        "image": Field((2, None, None), torch.float32),
    },
    documents="borders",
)  # fmt: skip


def packed() -> dict[str, Tensor]:
    return {
        "borders": torch.tensor(BORDERS, dtype=torch.int32),
        "patches": torch.arange(2.0 * 3 * 16).view(2, 3, 16), "image": torch.arange(2.0 * 2 * 5 * 7).view(2, 2, 5, 7),
    }  # fmt: skip


def packed_part() -> dict[str, Tensor]:
    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(2, 1, context_parallel_size=2)
    return PACKED.read(iter([packed()]) if mpu.get_tensor_model_parallel_rank() == 0 else None, 2)


def test_documents_are_split_each_for_itself_and_sizes_travel() -> None:
    parts = run_ranks(packed_part, 4)
    own = {0: [[0, 3, 4, 5, 10, 11, 12, 15], [0, 1, 6, 7, 8, 9, 14, 15]]}
    own[1] = [sorted(set(range(16)) - set(row)) for row in own[0]]
    for rank, part in enumerate(parts):
        assert part["image"].equal(packed()["image"])
        assert part["borders"].equal(packed()["borders"])
        for row, positions in enumerate(own[rank // 2]):  # tensor-parallel ranks are neighbours
            assert part["patches"][row].equal(packed()["patches"][row][:, positions])


class OneRank:
    """Megatron's parallel state of one process, but for context parallelism."""

    def __init__(self, cp: int = 1) -> None:
        self.cp = cp

    def __getattr__(self, name: str) -> Any:
        size = self.cp if name.startswith("get_context") else 1
        return lambda **_: size if name.endswith("world_size") else 0 if name.endswith("rank") else True


def refusal(monkeypatch: pytest.MonkeyPatch, asked: BatchSchema, sample: dict[str, Tensor], cp: int = 1) -> str:
    monkeypatch.setattr(schema, "mpu", OneRank(cp))
    with pytest.raises(DataError) as refused:
        asked.read(iter([sample]), 2)
    return str(refused.value)


def test_a_token_beyond_the_vocabulary_is_found_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = text() | {"labels": torch.full((ROWS, LENGTH), VOCABULARY)}
    said = refusal(monkeypatch, text_batch(LENGTH, VOCABULARY), sample)
    assert "'labels'" in said
    assert "got:   50" in said
    assert "0 to 49" in said


def test_what_is_missing_or_of_another_shape_or_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BatchSchema({"image": Field((2, None), torch.float32)})
    for value, got in (
        (None, "nothing"), (torch.zeros(2, 3, 4), "(2, 3, 4)"), (torch.zeros(2, 2), "(2, 2)"),
        (torch.zeros(1, 2, 4), "(1, 2, 4)"), (torch.zeros(2, 2, 4).double(), "torch.float64"),
    ):  # fmt: skip
        said = refusal(monkeypatch, asked, {} if value is None else {"image": value})
        assert "a micro-batch's 'image'" in said
        assert got in said


def test_what_cannot_be_split_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BatchSchema({"frames": Field((None,), torch.float32, sequence=0)})
    assert "a multiple of 4" in refusal(monkeypatch, whole, {"frames": torch.zeros(2, 6)}, cp=2)
    for borders, words in (([0, 6, 16], "lengths [6, 8, 10]"), ([0, 8, 12], "ends [12, 16]")):
        sample = packed() | {"borders": torch.tensor([borders, [0, 8, 16]], dtype=torch.int32)}
        assert words in refusal(monkeypatch, PACKED, sample, cp=2)
