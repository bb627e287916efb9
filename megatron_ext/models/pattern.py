"""The layer pattern: a model as a string, one character per residual sub-layer, in Megatron's own alphabet.

`M` is Mamba-2, `*` attention, `-` a dense MLP, `E` a mixture of experts; `|` marks a pipeline border. `*-*-` is a
Transformer, `MMMM` is Mamba-2, `M-M*-` a hybrid. One letter is ours: `L`, a linear map of the residual stream
(`linear_sublayer.py`), which stands where pruning took a sub-layer away. Two ways of counting a pattern:

- a *unit* is one sub-layer, one character: the finest thing depth pruning can drop;
- a *block* is a mixer with the MLPs that follow it: what people call a layer, and what "32 layers" counts.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatron_ext.errors import ConfigError

MAMBA, ATTENTION, MLP, MOE, LINEAR = "M", "*", "-", "E", "L"
KINDS = {
    MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "MLP", MOE: "mixture of experts", LINEAR: "linear",
}  # fmt: skip
MIXERS = MAMBA + ATTENTION
PIPE = "|"
EMBEDDING, FINAL = "embedding", "final"

# What people type when they mean one of ours.
_MEANT = {MAMBA: "mSs", ATTENTION: "AaxXT×∗", MLP: "Ff_–—−", MOE: "e", PIPE: "/,Il"}
_NEAREST = {typed: meant for meant, letters in _MEANT.items() for typed in letters}


class LayerOutput(NamedTuple):
    """A place in a model; a hidden state.

    Attributes:
        kind: `embedding`, `after`, `norm` or `final`.
        layer: Of `after` and `norm`: the sub-layer.
    """

    kind: str
    layer: int = 0

    def __str__(self) -> str:
        return {"after": f"{self.layer}", "norm": f"norm{self.layer}"}.get(self.kind, self.kind)


@dataclass(frozen=True)
class Pattern:
    """A parsed layer pattern.

    Attributes:
        units: One character per sub-layer, without pipeline borders.
        borders: Positions in `units` before which a pipeline stage begins, ascending; empty for one stage.
    """

    units: str
    borders: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Megatron's `--hybrid-layer-pattern`."""
        return PIPE.join(self.stages)

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    @property
    def stages(self) -> list[str]:
        """The units of each pipeline stage."""
        edges = [0, *self.borders, len(self.units)]
        return [self.units[start:stop] for start, stop in pairwise(edges)]

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """Unit indices of each block: a mixer and the MLPs after it. MLPs before the first mixer are a block."""
        blocks: list[list[int]] = []
        for i, kind in enumerate(self.units):
            if kind in MIXERS or not blocks:
                blocks.append([])
            blocks[-1].append(i)
        return [tuple(block) for block in blocks]

    def indices(self, kind: str) -> list[int]:
        """Unit indices of all sub-layers of one kind, such as `"M"`."""
        return [i for i, unit in enumerate(self.units) if unit == kind]

    def keep(self, kept: Collection[int]) -> "Pattern":
        """The pattern with only these unit indices left, in order, without pipeline borders.

        Raises:
            ConfigError: No unit is left, or an index does not exist.
        """
        if unknown := [i for i in kept if not 0 <= i < len(self)]:
            raise ConfigError("no such sub-layer", got=unknown, legal=f"0 to {len(self) - 1}")
        if not kept:
            raise ConfigError(f"nothing is left of the pattern {self.units!r}", legal="keep at least one sub-layer")
        return Pattern("".join(self.units[i] for i in sorted(set(kept))))

    def drop(self, dropped: Collection[int]) -> "Pattern":
        """The pattern without these unit indices; see `keep`."""
        if unknown := [i for i in dropped if not 0 <= i < len(self)]:
            raise ConfigError("no such sub-layer", got=unknown, legal=f"0 to {len(self) - 1}")
        return self.keep(set(range(len(self))) - set(dropped))

    def split(self, stages: int) -> "Pattern":
        """The pattern with borders for this many pipeline stages, replacing any it has.

        Stage sizes in sub-layers are as even as possible (least sum of squares; of equal ones, smaller stages
        first). Blocks are cut only if there are fewer blocks than stages.

        Raises:
            ConfigError: More stages than sub-layers.
        """
        if not 1 <= stages <= len(self):
            raise ConfigError(
                f"{len(self)} sub-layers cannot be split into {stages} pipeline stages", got=self.units,
                legal=f"1 to {len(self)} stages",
            )  # fmt: skip
        blocks = self.blocks
        sizes = [len(block) for block in blocks] if stages <= len(blocks) else [1] * len(self)
        edges = [0, *accumulate(sizes)]
        return Pattern(self.units, tuple(edges[cut] for cut in _even_cuts(edges, stages)))


def parse(text: str) -> Pattern:
    """Parse a layer pattern such as `"M-M-|*-M-"`.

    Raises:
        ConfigError: The pattern is empty, has an unknown letter, or an empty pipeline stage.
    """
    legal = ", ".join(f"{letter!r} {name}" for letter, name in KINDS.items()) + f", {PIPE!r} pipeline border"
    for position, letter in enumerate(text):
        if letter not in KINDS and letter != PIPE:
            hint = f"did you mean {_NEAREST[letter]!r}? " if letter in _NEAREST else ""
            raise ConfigError(
                f"unknown letter {letter!r} at position {position} of the layer pattern", got=text, legal=hint + legal
            )
    stages = text.split(PIPE)
    if not all(stages):
        what = "the layer pattern has an empty pipeline stage" if len(stages) > 1 else "the layer pattern is empty"
        raise ConfigError(what, got=repr(text), legal=legal)
    return Pattern("".join(stages), tuple(accumulate(len(stage) for stage in stages[:-1])))


def _even_cuts(edges: list[int], stages: int) -> list[int]:
    """Indices into `edges` where stages 2, 3, ... begin. Dynamic programme over (stages placed, edge reached)."""
    last = len(edges) - 1
    # best[j]: (sum of squares, sizes, cuts), least over all ways of filling the stages so far up to edge j
    best = {j: (edges[j] ** 2, (edges[j],), ()) for j in range(1, last + 1)}
    for stage in range(2, stages + 1):
        best = {
            j: min(
                (best[i][0] + (edges[j] - edges[i]) ** 2, (*best[i][1], edges[j] - edges[i]), (*best[i][2], i))
                for i in range(stage - 1, j)
            )
            for j in range(stage, last + 1)
        }
    return list(best[last][2])
