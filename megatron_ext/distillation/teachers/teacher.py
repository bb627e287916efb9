"""The teacher before it is built: which checkpoint, which model, and whether a student can learn from it."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.checkpoint import layout, tokenizer
from megatron_ext.checkpoint.checksums import verify_step
from megatron_ext.checkpoint.writer import check_shapes
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION

PADDING = 128
"""Megatron's default multiple to which a vocabulary is padded; so much padding passes anywhere."""


@dataclass(frozen=True)
class Teacher:
    """A teacher's weights on disk.

    Attributes:
        step: The complete step that they are read from.
        architecture: The model, as saved.
    """

    step: Path
    architecture: Architecture

    @classmethod
    def find(cls, path: str | Path) -> "Teacher":
        """The newest complete step at `path`, a checkpoint directory or a step in one.

        Raises:
            CheckpointError: There is none, it is damaged, or its tensors are not those of the model it names.
        """
        step = layout.find(path).path
        architecture = layout.architecture(step)
        verify_step(step, weights_only=True)
        check_shapes(architecture, {key: shape for key, (shape, _) in layout.tensors(step).items()})
        return cls(step, architecture)

    def check(
        self,
        student: Architecture,
        *,
        vocab_size: int,
        student_multiple: int,
        tp: int,
        stages: int,
        ep: int = 1,
        tokenizer_model: Path | None = None,
    ) -> None:
        """Check that `student` can learn from this teacher, on this layout.

        Args:
            student: The student.
            vocab_size: Entries of the tokenizer, without padding.
            student_multiple: Multiple to which the student's vocabulary is padded.
            tp: Tensor-parallel size.
            stages: Pipeline stages, virtual ones included.
            ep: Expert-parallel size.
            tokenizer_model: Directory of the tokenizer, if it is one of Hugging Face.

        Raises:
            ConfigError: The teacher has another tokenizer, the vocabularies differ by more than padding, or the teacher
                does not fit the layout.
        """
        try:
            self.architecture.validate(tp=tp, pp=stages, ep=ep)
            if stages > 1:
                self.architecture.layers.split(stages)
        except ConfigError as error:
            raise ConfigError(f"the teacher cannot run beside the student: {error}") from error
        if tokenizer.check(self.step, tokenizer_model, "the teacher"):
            student_multiple = multiple = sys.maxsize  # then all beyond the tokens is padding, however much it is
        else:
            multiple = self._padding_multiple()
        own, others = self.architecture.padded_vocab_size, student.padded_vocab_size
        check_vocabularies(vocab_size, others, student_multiple, own, multiple)

    def check_length(self, length: int) -> None:
        """Check that its rotary positions reach over a sequence; without positions it needs nothing.

        Args:
            length: Tokens of the sequence.

        Raises:
            ConfigError: They do not.
        """
        own = self.architecture
        rotary = ATTENTION in own.pattern and own.position_embedding_type == "rope"
        if rotary and length > own.max_position_embeddings:
            raise ConfigError(
                "the teacher's rotary positions do not reach as far as the sequence",
                got=f"--seq-length {length}, the teacher's {own.max_position_embeddings}",
                legal=f"--seq-length {own.max_position_embeddings} or less, or a teacher that was trained on longer "
                "sequences (docs/long_context.md)",
            )

    def with_student_vocab(self, student: Architecture) -> Architecture:
        """This teacher, its vocabulary padded as the student's is, so that the ranks' parts of both line up."""
        return replace(self.architecture, padded_vocab_size=student.padded_vocab_size)

    def _padding_multiple(self) -> int:
        try:
            args = layout.common(self.step).get("args")
        except CheckpointError:
            return PADDING
        divisor = getattr(args, "make_vocab_size_divisible_by", None) or PADDING
        return divisor * (getattr(args, "tensor_model_parallel_size", None) or 1)


def check_vocabularies(
    vocab_size: int, student: int, student_multiple: int, teacher: int, teacher_multiple: int
) -> None:
    """Two padded vocabularies are one if they are equal, or if each is `vocab_size` entries and padding.

    Args:
        vocab_size: Entries of the tokenizer.
        student: Rows of the student's embedding, its `padded_vocab_size`.
        student_multiple: Multiple to which they are padded; less than this, or than `PADDING`, is padding.
        teacher: Rows of the teacher's embedding.
        teacher_multiple: As above, of the teacher.

    Raises:
        ConfigError: They are not one.
    """
    short = min(student, teacher) < vocab_size
    student_padding, teacher_padding = student - vocab_size, teacher - vocab_size
    padded = student_padding < max(PADDING, student_multiple) and teacher_padding < max(PADDING, teacher_multiple)
    if short or (student != teacher and not padded):
        raise ConfigError(
            "teacher and student have different vocabularies",
            got=f"teacher {teacher:,}, student {student:,}, tokenizer {vocab_size:,}",
            legal="a student and a tokenizer with the teacher's vocabulary; of a teacher that does not say which it "
            "has, no more than its usual padding may differ (megatron-ext convert --pad-vocab-to)",
        )
