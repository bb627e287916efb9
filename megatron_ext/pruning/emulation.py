"""A linear emulation of what a sub-layer adds to the residual stream: x + f(x) becomes x + up (down x) + bias.

"A deeper look at depth pruning of LLMs" (arXiv 2407.16286) puts a bias or a low-rank map in a dropped block's place.
Here both are closed forms of moments in float64, summed over calibration tokens: a mean, and reduced-rank ridge
regression.

Shapes: n tokens, d channels of the stream, r rank.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Sums over tokens, in float64, on the device of what is added.

    Args:
        size: d.
        second: Whether products are summed, which a low-rank map needs: two matrices of d x d.

    Attributes:
        sums: By name; `count` and `square` (of f) are numbers, `x` and `f` (d,), `xx` and `fx` (d, d).
    """

    def __init__(self, size: int, second: bool) -> None:
        self.sums: dict[str, Tensor] = {
            "count": torch.zeros((), dtype=torch.float64), "square": torch.zeros((), dtype=torch.float64),
            "x_square": torch.zeros((), dtype=torch.float64),
            "x": torch.zeros(size, dtype=torch.float64), "f": torch.zeros(size, dtype=torch.float64),
        }  # fmt: skip
        if second:
            self.sums |= {name: torch.zeros(size, size, dtype=torch.float64) for name in ("xx", "fx")}

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"], f: Float[Tensor, "n d"]) -> None:
        """Add tokens."""
        x, f = x.double(), f.double()
        self.sums = {name: value.to(x.device) for name, value in self.sums.items()}
        self.sums["count"] += len(x)
        self.sums["square"] += f.square().sum()
        self.sums["x_square"] += x.square().sum()
        self.sums["x"] += x.sum(0)
        self.sums["f"] += f.sum(0)
        if "xx" in self.sums:
            self.sums["xx"].addmm_(x.T, x)
            self.sums["fx"].addmm_(f.T, x)

    @staticmethod
    def bytes(size: int, second: bool) -> int:
        """What one takes."""
        return 8 * (2 * size * size if second else 2 * size)


@dataclass(frozen=True)
class Emulator:
    """What stands for a sub-layer, float32 on the CPU, and how well it does.

    Attributes:
        bias: (d,)
        down: (r, d); None of a bias alone.
        up: (d, r)
        size: Of the update beside the stream, sqrt(E|f|^2 / E|x|^2).
        mean: The share of E|f|^2 that is in the mean, |E f|^2.
        explained: (d + 1,) For each rank from 0, the share of the variance E|f - E f|^2 that the best map of that rank
            explains on the calibration data; empty of a bias alone.
    """

    bias: Tensor
    down: Tensor | None = None
    up: Tensor | None = None
    size: float = 0.0
    mean: float = 0.0
    explained: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __call__(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The emulated update, in the type of x."""
        bias = self.bias.to(x)
        if self.down is None or self.up is None:
            return bias.expand_as(x)
        return torch.nn.functional.linear(x @ self.down.to(x).T, self.up.to(x), bias)

    def of_rank(self, rank: int) -> Self:
        """The same function in factors of at least this rank."""
        if self.down is None or self.up is None:
            size = len(self.bias)
            down, up = self.bias.new_zeros(0, size), self.bias.new_zeros(size, 0)
        else:
            down, up = self.down, self.up
        if rank <= len(down):
            return self
        more = rank - len(down)
        down = torch.cat([down, down.new_zeros(more, down.shape[1])])
        up = torch.cat([up, up.new_zeros(len(up), more)], dim=1)
        return type(self)(self.bias, down, up, self.size, self.mean, self.explained)


def fit(moments: Moments, rank: int, ridge: float) -> Emulator:
    """The emulation of least squared error on the tokens that were seen.

    With Sxx and Sfx the covariances, lambda = `ridge` times the median variance of a channel, S = Sxx + lambda I and
    W = Sfx S^-1 the ridge regression, the best map of rank r is U U^T W with U the r largest eigenvectors of
    Sfx S^-1 Sfx^T (reduced-rank regression; Izenman 1975): `up` is U, `down` U^T W. bias = E f - up down E x.

    Args:
        moments: With second moments, unless `rank` is 0.
        rank: From 0, a bias alone, to d, which is the regression itself.
        ridge: From 0.
    """
    sums = {name: value.cpu() for name, value in moments.sums.items()}
    count = sums["count"].clamp_min(1)
    x, f = sums["x"] / count, sums["f"] / count
    total, mean = float(sums["square"] / count), float(f @ f)
    size = (total / max(float(sums["x_square"] / count), 1e-300)) ** 0.5
    share = mean / total if total else 0.0
    if "xx" not in sums:
        return Emulator(f.float(), size=size, mean=share)
    xx, fx = sums["xx"] / count - torch.outer(x, x), sums["fx"] / count - torch.outer(f, x)
    variances = xx.diagonal()
    scale = float(variances.median()) or float(variances.mean())
    penalty = ridge * scale
    inverse = torch.linalg.pinv(xx + penalty * torch.eye(len(x), dtype=torch.float64), hermitian=True)
    whole = fx @ inverse
    values, vectors = torch.linalg.eigh(whole @ fx.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rows = vectors.T @ whole
    # |f - f_hat|^2 = |f|^2 - sum of eigenvalues - lambda |W_r|^2, all of what is centred.
    gains = (values + penalty * rows.square().sum(1)).cumsum(0)
    variance = total - mean
    explained = torch.cat([torch.zeros(1, dtype=torch.float64), gains / variance if variance > 0 else 0 * gains])
    explained = explained.clamp(0, 1)
    if rank == 0:
        return Emulator(f.float(), size=size, mean=share, explained=explained)
    up, down = vectors[:, :rank].contiguous(), rows[:rank].contiguous()
    up, down = _balanced(up, down)
    return Emulator((f - up @ (down @ x)).float(), down.float(), up.float(), size, share, explained)


def _balanced(up: Float[Tensor, "d r"], down: Float[Tensor, "r d"]) -> tuple[Tensor, Tensor]:
    """The same product of factors of equal norms, which train alike and fit into 16 bits."""
    norms = down.norm(dim=1).clamp_min(torch.finfo(down.dtype).tiny)
    scale = (up.norm(dim=0) / norms).sqrt()
    return up / scale, down * scale[:, None]
