"""Shapley values by permutation sampling: the average part that each player has in a game's value.

Source: "A deeper look at depth pruning of LLMs" (arXiv 2407.16286), which scores transformer blocks so. Here players
are the units of a model, and a coalition's value is what the model with only these units is worth.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class ShapleyValues:
    """Estimates, by player.

    Attributes:
        values: The values; they sum up to the whole's value minus that of the smallest coalition sampled.
        errors: Standard errors of the values, infinite after a single sample.
        samples: Permutations taken, pairs of a permutation and its reverse counted as one.
    """

    values: list[float]
    errors: list[float]
    samples: int


def shapley(
    worth: Callable[[frozenset[int]], float],
    players: Sequence[int],
    *,
    seed: int = 0,
    max_samples: int = 16,
    tolerance: float = 0.05,
    keep: float = 0.0,
    progress: Callable[[int, float], None] = lambda samples, error: None,
) -> ShapleyValues:
    """Sample permutations; in each, players leave one after the other and are charged with what that costs.

    Each permutation goes with its reverse, whose errors tend to cancel (antithetic sampling). Players that would leave
    below the share `keep` stay, so that a large model is only ever seen nearly whole, as in the paper; a player that
    never left in any sample is an error.

    Stops when the largest standard error is at most `tolerance` times the range of the values, or after `max_samples`.

    Args:
        worth: The value of the coalition without these players.
        players: Who plays; at least two.
        seed: Chooses the permutations.
        max_samples: Pairs of permutations, at least 2.
        tolerance: The stop rule, a share of the range.
        keep: Share of the players that always stay; 0 for the classical value.
        progress: Called after each pair with their number and the largest standard error.

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
    leaving = max(1, len(players) - math.ceil(keep * len(players)))
    draws: dict[int, list[float]] = {player: [] for player in players}
    samples, values, errors = 0, list[float](), list[float]()
    for order in _orders(players, random.Random(seed)):
        charges: dict[int, list[float]] = {player: [] for player in players}
        for direction in (order, order[::-1]):
            before, gone = worth(frozenset()), frozenset[int]()
            for player in direction[:leaving]:
                gone |= {player}
                after = worth(gone)
                charges[player].append(before - after)
                before = after
        for player, charged in charges.items():
            if charged:
                draws[player].append(sum(charged) / len(charged))
        samples += 1
        errors = [_standard_error(draws[player]) for player in players]
        values = [_mean(draws[player]) for player in players]
        progress(samples, max(errors))
        # Without a limit on who leaves, every player does in every sample; else go on until each has, twice.
        if all(math.isfinite(e) for e in errors) and max(errors) <= tolerance * (max(values) - min(values)):
            break
        if samples >= max_samples and all(draws.values()):
            break
    return ShapleyValues(values, errors, samples)


def _orders(players: Sequence[int], draw: random.Random) -> Iterator[list[int]]:
    while True:
        order = list(players)
        draw.shuffle(order)
        yield order


def _mean(draws: list[float]) -> float:
    return sum(draws) / len(draws) if draws else 0.0


def _standard_error(draws: list[float]) -> float:
    if len(draws) < 2:
        return math.inf
    mean = _mean(draws)
    return math.sqrt(sum((draw - mean) ** 2 for draw in draws) / (len(draws) - 1) / len(draws))
