"""Intermediate states that a student matches: which ones, with which of the teacher's, and on which pipeline stage.

A *point* is a place where a model has a hidden state:

- `embedding`: the output of the embedding;
- `5`: the residual stream after sub-layer 5 of the pattern, counted from 0;
- `norm5`: what sub-layer 5 reads, the residual stream after its pre-norm;
- `final`: the output of the final norm.

A *pair* is a point of each model, `STUDENT:TEACHER`; one that the models have in common may be written once.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import EMBEDDING, FINAL, KINDS, LINEAR, LayerOutput, Pattern

ALL = "all"
_LEGAL = (
    "pairs STUDENT:TEACHER of embedding, final, a sub-layer's number, or norm and a number (what it reads); or all, "
    f"or a kind of sub-layer ({', '.join(KINDS)}), with norm before it or not"
)


class LayerPair(NamedTuple):
    """A state of the student that should become one of the teacher's."""

    student: LayerOutput
    teacher: LayerOutput

    def __str__(self) -> str:
        return f"{self.student}:{self.teacher}"


def parse(words: Sequence[str], student: Pattern, teacher: Pattern) -> tuple[LayerPair, ...]:
    """The pairs that were asked for.

    A kind of sub-layer (`*`, `M`, `-`, `E`) stands for a pair for each of the student's sub-layers of that kind, with
    the teacher's at the same relative depth among those of that kind, the last with the last; `all` for the same over
    the sub-layers of every kind.

    Raises:
        ConfigError: A word is no pair, or a point does not exist.
    """
    pairs: list[LayerPair] = []
    for word in words:
        norm, kind = ("norm", word[4:]) if word.startswith("norm") else ("after", word)
        if kind == ALL or kind in KINDS:
            own, other = (p.indices(kind) if kind in KINDS else list(range(len(p))) for p in (student, teacher))
            if not own or not other:
                raise ConfigError(f"not both models have sub-layers of kind {kind!r}", got=word, legal=_LEGAL)
            if norm == "norm" and LINEAR in student.units + teacher.units and kind in (ALL, LINEAR):
                raise ConfigError("a linear sub-layer has no norm", got=word, legal=word.removeprefix("norm"))
            matched = [other[-(-(i + 1) * len(other) // len(own)) - 1] for i in range(len(own))]
            pairs += [LayerPair(LayerOutput(norm, s), LayerOutput(norm, t)) for s, t in zip(own, matched, strict=True)]
            continue
        sides = (word.split(":") * 2)[:2] if word.count(":") < 2 else []
        if not sides:
            raise ConfigError("no pair of states", got=word, legal=_LEGAL)
        pairs.append(LayerPair(*(_point(side, word, p) for side, p in zip(sides, (student, teacher), strict=True))))
    if len(set(pairs)) < len(pairs):
        raise ConfigError("a pair of states is named twice", got=" ".join(map(str, pairs)))
    return tuple(pairs)


def _point(text: str, word: str, pattern: Pattern) -> LayerOutput:
    if text in (EMBEDDING, FINAL):
        return LayerOutput(text)
    found = re.fullmatch(r"(norm)?(\d+)", text)
    if found is None:
        raise ConfigError("no pair of states", got=word, legal=_LEGAL)
    point = LayerOutput(found[1] or "after", int(found[2]))
    if point.layer >= len(pattern):
        raise ConfigError("no such sub-layer", got=word, legal=f"0 to {len(pattern) - 1} of {pattern.units}")
    if point.kind == "norm" and pattern.units[point.layer] == LINEAR:
        raise ConfigError("a linear sub-layer has no norm", got=word, legal=f"{point.layer}, the stream after it")
    return point


def mean_squared_error(student: Float[Tensor, "s b h"], teacher: Float[Tensor, "s b h"]) -> Float[Tensor, "s b"]:
    """Of each token, the mean over the channels of the squared difference, in fp32."""
    return (student.float() - teacher.float()).square().mean(-1)


def cosine_distance(student: Float[Tensor, "s b h"], teacher: Float[Tensor, "s b h"]) -> Float[Tensor, "s b"]:
    """Of each token, one minus the cosine between the two states, in fp32."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mean_squared_error, "cosine": cosine_distance}


class MessagePart(NamedTuple):
    """One of the tensors that a pipeline stage hands to the next, side by side in the last dimension.

    Attributes:
        name: What it is.
        width: Channels.
        trained: Whether a gradient comes back for it.
    """

    name: str
    width: int
    trained: bool


STUDENT, TEACHER = "student", "teacher"


class LayerLoss(NamedTuple):
    """A pair that meets on a stage.

    Attributes:
        pair: Its number.
        student: The name of the student's state.
        teacher: The name of the teacher's.
        value: The name of what its loss came to.
    """

    pair: int
    student: str
    teacher: str
    value: str


@dataclass(frozen=True)
class StagePlan:
    """What a stage does with hidden states in each micro-batch, by their names.

    Attributes:
        incoming: What the stage before hands on; nothing on the first.
        losses: The pairs that meet here.
        outgoing: What this stage hands on.
    """

    incoming: tuple[MessagePart, ...]
    losses: tuple[LayerLoss, ...]
    outgoing: tuple[MessagePart, ...]


@dataclass(frozen=True)
class PipelineRouting:
    """What travels between pipeline stages, so that each pair meets on the first stage where both its states exist.

    A state that is there earlier than its partner is carried on. What a pair's loss came to is carried on, too, so that
    the last stage weighs and logs all of them.

    Attributes:
        pairs: The pairs.
        widths: Hidden sizes of student and teacher.
        student: Sub-layers of the student on each stage (virtual stages counted one by one).
        teacher: Sub-layers of the teacher on each stage; None if its states arrive on the last stage.
        trained: Whether the teacher is trained, too.
    """

    pairs: tuple[LayerPair, ...]
    widths: tuple[int, int]
    student: tuple[int, ...]
    teacher: tuple[int, ...] | None
    trained: bool = False

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.student)

    def points(self, stage: int, side: str) -> list[LayerOutput]:
        """The states of one model that are needed and come to be on this stage."""
        wanted = {getattr(pair, side) for pair in self.pairs}
        return sorted(point for point in wanted if self._stage_of(point, side) == stage)

    def plan(self, stage: int, dtype: torch.dtype) -> StagePlan:
        """What a stage does in each micro-batch whose hidden states are of this type; made once."""
        return _plan(self, stage, dtype)

    def width(self, stage: int, dtype: torch.dtype) -> int:
        """Channels that this stage hands to the next."""
        return sum(part.width for part in self.plan(stage, dtype).outgoing)

    def meeting(self, stage: int) -> list[int]:
        """Numbers of the pairs that meet on this stage."""
        return [i for i, pair in enumerate(self.pairs) if self._loss_stage(pair) == stage]

    def leaving(self, stage: int, dtype: torch.dtype) -> list[MessagePart]:
        """What this stage hands to the next."""
        parts = [MessagePart(STUDENT, self.widths[0], True)]
        if self.teacher is not None:
            parts.append(MessagePart(TEACHER, self.widths[1], self.trained))
        for side, width in ((STUDENT, self.widths[0]), (TEACHER, self.widths[1])):
            waiting = {
                getattr(pair, side)
                for pair in self.pairs
                if self._stage_of(getattr(pair, side), side) <= stage < self._loss_stage(pair)
            }
            parts += [MessagePart(state(side, point), width, side == STUDENT) for point in sorted(waiting)]
        met = [i for i, pair in enumerate(self.pairs) if self._loss_stage(pair) <= stage]
        return parts + [MessagePart(distance(i), bf16_terms(dtype), True) for i in met]

    def _stage_of(self, point: LayerOutput, side: str) -> int:
        layers = self.student if side == STUDENT else self.teacher
        if layers is None or point.kind == FINAL:
            return self.stages - 1
        if point.kind == EMBEDDING:
            return 0
        return next(stage for stage, end in enumerate(accumulate(layers)) if point.layer < end)

    def _loss_stage(self, pair: LayerPair) -> int:
        return max(self._stage_of(pair.student, STUDENT), self._stage_of(pair.teacher, TEACHER))


@cache
def _plan(routing: PipelineRouting, stage: int, dtype: torch.dtype) -> StagePlan:
    losses = []
    for i in routing.meeting(stage):
        pair = routing.pairs[i]
        losses.append(LayerLoss(i, state(STUDENT, pair.student), state(TEACHER, pair.teacher), distance(i)))
    incoming = routing.leaving(stage - 1, dtype) if stage else []
    return StagePlan(tuple(incoming), tuple(losses), tuple(routing.leaving(stage, dtype)))


def state(side: str, point: LayerOutput) -> str:
    """The name of a state on its way."""
    return f"{side} {point}"


def names(side: str, points: Iterable[LayerOutput]) -> dict[LayerOutput, str]:
    """The names of states on their way, and that of what a model gives out, `final`."""
    return {point: state(side, point) for point in (*points, LayerOutput(FINAL))}


def distance(pair: int) -> str:
    """The name of what a pair's loss came to."""
    return f"distance {pair}"


def pack(parts: Sequence[MessagePart], tensors: dict[str, Tensor]) -> Float[Tensor, "s b w"]:
    """Put the parts side by side, in the type of the first."""
    first = tensors[parts[0].name]
    return torch.cat([tensors[part.name].to(first.dtype) for part in parts], dim=-1)


def unpack(parts: Sequence[MessagePart], tensor: Float[Tensor, "s b w"]) -> dict[str, Tensor]:
    """The parts again; no gradient goes back to those that are not trained."""
    split = tensor.split([part.width for part in parts], dim=-1)
    return {p.name: (x if p.trained else x.detach()).contiguous() for p, x in zip(parts, split, strict=True)}


def bf16_terms(dtype: torch.dtype) -> int:
    """How many numbers of this type a number in fp32 is the sum of, digit by digit."""
    return {torch.float32: 1, torch.bfloat16: 3}.get(dtype, 3)


def split_bf16(value: Float[Tensor, "s b"], dtype: torch.dtype) -> Float[Tensor, "s b p"]:
    """A value in fp32 as one that travels in another type without loss; the gradient comes back the same way."""
    return _SplitBf16.apply(value, dtype)


def join_bf16(split: Float[Tensor, "s b p"]) -> Float[Tensor, "s b"]:
    """The value in fp32 again."""
    return _JoinBf16.apply(split)


def _split(value: Tensor, dtype: torch.dtype) -> Tensor:
    parts, rest = [], value
    for _ in range(bf16_terms(dtype)):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts, dim=-1)


class _SplitBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, dtype):
        return _split(value, dtype)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0].float().sum(-1), None


class _JoinBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, split):
        ctx.dtype = split.dtype
        return split.float().sum(-1)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return _split(grad_outputs[0], ctx.dtype)
