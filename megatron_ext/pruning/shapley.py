"""Shapley values by permutation sampling: the average part that each player has in a game's value.

Source: "A deeper look at depth pruning of LLMs" (arXiv 2407.16286), which scores transformer blocks so. Here players
are the units of a model, and a coalition's value is what the model with only these units is worth.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from megatron_ext.errors import ConfigError

CONFIDENCE = 0.95
FEWEST = 8  # samples before the stop rule may end it: by chance, few samples agree too well


@dataclass(frozen=True)
class ShapleyValues:
    """Estimates, by player.

    Attributes:
        values: The values; without `keep` they sum up to the whole's value minus that of nobody.
        errors: Standard errors of the values.
        intervals: Half-widths of their 95% confidence intervals, by Student's t.
        samples: Samples taken; each player has one draw in each.
    """

    values: list[float]
    errors: list[float]
    intervals: list[float]
    samples: int


def shapley(
    worth: Callable[[frozenset[int]], float],
    players: Sequence[int],
    *,
    seed: int = 0,
    max_samples: int = 16,
    tolerance: float = 0.1,
    keep: float = 0.0,
    progress: Callable[[int, float], None] = lambda samples, interval: None,
) -> ShapleyValues:
    """Sample permutations; in each, players leave one after the other and are charged with what that costs.

    Each permutation goes with its reverse, whose errors tend to cancel (antithetic sampling); a player's draw is the
    mean of the two. The share `keep` of the players always stays, so that a large model is only ever seen nearly whole,
    as in the paper: the value is then the mean charge of a player among the first that leave. A permutation is cut into
    runs of as many players as may leave, each of which begins with everybody there, so that every player has one draw
    in every sample.

    Stops when no interval's half-width is above `tolerance` times the range of the values, after `FEWEST` samples at
    the earliest, or after `max_samples`.

    Args:
        worth: The value of the coalition without these players.
        players: Who plays; at least two.
        seed: Chooses the permutations.
        max_samples: Samples, at least 2.
        tolerance: The stop rule, a share of the range.
        keep: Share of the players that always stay; 0 for the classical value.
        progress: Called after each sample with their number and the widest interval's half-width.

    Raises:
        ConfigError: An option is out of range.
    """
    if len(players) < 2:
        raise ConfigError("Shapley values of fewer than two units", got=len(players))
    if max_samples < 2 or tolerance < 0 or not 0 <= keep < 1:
        raise ConfigError(
            "Shapley options", got=f"{max_samples} samples, tolerance {tolerance}, keep {keep}",
            legal="at least 2 samples, tolerance from 0, keep from 0 up to 1",
        )  # fmt: skip
    # Rounded: 0.1 times 30 is above 3.
    leaving = max(1, len(players) - math.ceil(round(keep * len(players), 6)))
    draws: dict[int, list[float]] = {player: [] for player in players}
    draw = random.Random(seed)
    for samples in range(1, max_samples + 1):
        for order, charged in _runs(players, leaving, draw):
            charges = _charges(worth, order), _charges(worth, order[::-1])
            for player in charged:
                draws[player].append((charges[0][player] + charges[1][player]) / 2)
        if samples == 1:
            continue
        values = [fmean(own) for own in draws.values()]
        errors = [stdev(own) / math.sqrt(samples) for own in draws.values()]
        intervals = [student(samples - 1) * error for error in errors]
        progress(samples, max(intervals))
        enough = max(intervals) <= tolerance * (max(values) - min(values))
        if samples == max_samples or (enough and samples >= FEWEST):
            return ShapleyValues(values, errors, intervals, samples)
    raise AssertionError("the last sample returns")


def _runs(players: Sequence[int], leaving: int, draw: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """All players in random runs of `leaving`, in the order in which they leave, and who is charged.

    The last run is filled up with others, who have had their draw, and is shuffled with them: any player's place in its
    run, and who has left before it, are then as likely as any other.
    """
    order = list(players)
    draw.shuffle(order)
    for first in range(0, len(order), leaving):
        charged = order[first : first + leaving]
        run = charged + draw.sample(order[:first], leaving - len(charged))
        if len(run) > len(charged):
            draw.shuffle(run)
        yield run, charged


def _charges(worth: Callable[[frozenset[int]], float], order: Sequence[int]) -> dict[int, float]:
    """What the whole loses with each of these players, who leave in this order."""
    before, gone, charges = worth(frozenset()), frozenset[int](), {}
    for player in order:
        gone |= {player}
        after = worth(gone)
        charges[player], before = before - after, after
    return charges


def student(freedom: int) -> float:
    """The quantile of Student's t distribution that a two-sided interval of `CONFIDENCE` takes.

    In closed form for one and two degrees of freedom, else Abramowitz and Stegun's expansion 26.7.5, exact to 0.5%.
    """
    p = (1 + CONFIDENCE) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z, n = NormalDist().inv_cdf(p), freedom
    terms = (
        (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )  # fmt: skip
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))
