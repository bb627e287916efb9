"""Which teachers a student can learn from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.writer import writing
from megatron_ext.distillation.teachers import teacher as teacher_module
from megatron_ext.distillation.teachers.teacher import Teacher, check_vocabularies
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture

STUDENT = Architecture(
    pattern="M-*-", hidden_size=16, padded_vocab_size=128, max_position_embeddings=32, ffn_hidden_size=16,
    num_attention_heads=2, num_query_groups=2, kv_channels=8,
    mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=8, mamba_num_groups=2,
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with writing(tmp_path / "teacher", STUDENT) as writer:
        for key, shape in axes.tensors(STUDENT).items():
            writer.write(key, torch.zeros(shape))
    return tmp_path / "teacher"


def check(
    teacher: Teacher, student: Architecture = STUDENT, vocab_size: int = 100, tp: int = 1, stages: int = 1
) -> None:
    teacher.check(student, vocab_size=vocab_size, student_multiple=128, tp=tp, stages=stages)


def test_is_found_by_directory_and_by_step(checkpoint: Path) -> None:
    by_directory, by_step = Teacher.find(checkpoint), Teacher.find(checkpoint / "release")
    assert by_directory == by_step
    assert by_directory.architecture == STUDENT
    check(by_directory, tp=2, stages=2)


def test_a_damaged_one_is_refused(checkpoint: Path) -> None:
    (data,) = (checkpoint / "release").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Teacher.find(checkpoint)
    with pytest.raises(CheckpointError, match="does not exist"):
        Teacher.find(checkpoint / "nothing")


def test_one_that_is_not_what_it_says_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "architecture", lambda step: replace(STUDENT, ffn_hidden_size=32))
    with pytest.raises(CheckpointError, match="not those of the model"):
        Teacher.find(checkpoint)


@pytest.mark.parametrize(("tp", "stages"), [(4, 1), (1, 5)])
def test_must_fit_the_layout(checkpoint: Path, tp: int, stages: int) -> None:
    with pytest.raises(ConfigError, match="the teacher cannot run beside the student"):
        check(Teacher.find(checkpoint), tp=tp, stages=stages)


@pytest.mark.parametrize(
    ("position", "pattern", "length", "reaches"),
    [("rope", "M-*-", 32, True), ("rope", "M-*-", 33, False), ("none", "M-*-", 33, True), ("rope", "M-M-", 33, True)],
)
def test_reaches_over_the_sequence(position: str, pattern: str, length: int, reaches: bool) -> None:
    own = replace(STUDENT, position_embedding_type=position, pattern=pattern)  # type: ignore[arg-type]
    teacher = Teacher(Path(), own)
    if reaches:
        teacher.check_length(length)
        return
    with pytest.raises(ConfigError, match="do not reach as far as the sequence"):
        teacher.check_length(length)


def test_of_one_tokenizer_any_padding_goes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5's 152,064 and 151,936 rows are both padding beyond the tokenizer's 151,665 tokens."""
    student = replace(STUDENT, padded_vocab_size=1024)
    with pytest.raises(ConfigError, match="different vocabularies"):
        check(Teacher.find(checkpoint), student)
    monkeypatch.setattr(teacher_module.tokenizer, "check", lambda step, named, whose: True)
    check(Teacher.find(checkpoint), student)
    with pytest.raises(ConfigError, match="different vocabularies"):
        check(Teacher.find(checkpoint), student, vocab_size=129)


def test_is_padded_as_the_student_is(checkpoint: Path) -> None:
    teacher, student = Teacher.find(checkpoint), replace(STUDENT, padded_vocab_size=104, hidden_size=8)
    check(teacher, student)
    assert teacher.with_student_vocab(student) == replace(STUDENT, padded_vocab_size=104)


@pytest.mark.parametrize(
    ("tokens", "student", "teacher", "same"),
    [
        (100, 128, 128, True),
        (50, 512, 512, True),  # as large as each other: the rest of both is padding
        (100, 128, 104, True),
        (1000, 1024, 1024 + 100, True),  # 124 rows of padding
        (1000, 1024, 2048, False),
        (1000, 2048, 1024, False),
        (1100, 1024, 1152, False),  # tokens that the student does not have
        (1100, 1152, 1024, False),
    ],
)
def test_vocabularies_may_differ_by_padding(tokens: int, student: int, teacher: int, same: bool) -> None:
    if same:
        check_vocabularies(tokens, student, 8, teacher, 128)
        return
    with pytest.raises(ConfigError, match="different vocabularies"):
        check_vocabularies(tokens, student, 8, teacher, 128)


def test_a_wide_layout_pads_more() -> None:
    check_vocabularies(1000, 1024, 128, 2048, 2048)
