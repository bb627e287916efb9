import functools
import math
import random
from collections.abc import Callable
from itertools import combinations, permutations, product
from math import factorial
from statistics import fmean

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.pruning.shapley import FEWEST, shapley, student

PLAYERS = range(4)
WEIGHTS = (1.0, -2.0, 0.5, 4.0)


def worth(gone: frozenset[int]) -> float:
    """A game of four with interactions: players 0 and 3 need each other, 1 and 2 do the same work."""
    there = set(PLAYERS) - gone
    value = sum(WEIGHTS[i] for i in there)
    return value + 3 * ({0, 3} <= there) - 1.5 * ({1, 2} <= there) + 0.7 * (there == set(PLAYERS))


def exact() -> list[float]:
    """All orders in which the players may leave."""
    values = [0.0] * 4
    for order in permutations(PLAYERS):
        gone: frozenset[int] = frozenset()
        for player in order:
            after = gone | {player}
            values[player] += (worth(gone) - worth(after)) / factorial(4)
            gone = after
    return values


def test_values_come_close_to_the_exact_ones():
    found = shapley(worth, PLAYERS, max_samples=4000, tolerance=0.01)
    assert found.samples < 4000
    for value, error, expected in zip(found.values, found.errors, exact(), strict=True):
        assert abs(value - expected) < 4 * error
    assert max(found.intervals) <= 0.01 * (max(found.values) - min(found.values))


def test_values_sum_up_to_what_the_whole_is_worth():
    for samples in (2, 3, 9):
        found = shapley(worth, PLAYERS, max_samples=samples, tolerance=0)
        assert found.samples == samples
        assert sum(found.values) == pytest.approx(worth(frozenset()) - worth(frozenset(PLAYERS)))


def test_without_interactions_every_sample_is_exact():
    found = shapley(lambda gone: sum(WEIGHTS[i] for i in PLAYERS if i not in gone), PLAYERS)
    assert found.values == pytest.approx(WEIGHTS)
    assert found.samples == FEWEST  # the stop rule: no error is left


@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("count", [2, 7, 32])
def test_every_player_has_a_draw_in_every_sample_whatever_stays(keep, count):
    """The paper keeps nine tenths of 32 layers: two samples are enough for an error of each."""
    seen = set()

    def watched(gone: frozenset[int]) -> float:
        seen.add(len(gone))
        return -(sum(1 + i % 5 for i in gone) ** 1.5)

    for seed in range(20):
        found = shapley(watched, range(count), keep=keep, seed=seed, max_samples=2)
        assert all(math.isfinite(number) for number in (*found.errors, *found.intervals))
        assert found.samples == 2
    assert max(seen) == max(1, count - math.ceil(round(keep * count, 6)))


def game(seed: int, count: int) -> Callable[[frozenset[int]], float]:
    """Worth of a model without some layers: each costs something, pairs help or hurt, and a loss has its worst."""
    draw = random.Random(seed)
    costs = [math.exp(draw.gauss(-1.5, 1)) for _ in range(count)]
    pairs = {pair: draw.gauss(0, 0.2) for pair in combinations(range(count), 2)}

    @functools.cache
    def worth(gone: frozenset[int]) -> float:
        alone = sum(costs[i] for i in gone)
        together = sum(value for pair, value in pairs.items() if gone.issuperset(pair))
        return -6 * (1 - math.exp(-alone / 3)) - together

    return worth


def enumerated(worth: Callable[[frozenset[int]], float], count: int, leaving: int) -> list[float]:
    """The mean charge of each player among the first `leaving` that go: all sets that may have gone before it."""
    values = []
    for player in range(count):
        others = [i for i in range(count) if i != player]
        places = [
            fmean(worth(frozenset(gone)) - worth(frozenset((*gone, player))) for gone in combinations(others, place))
            for place in range(leaving)
        ]
        values.append(fmean(places))
    return values


def test_intervals_hold_the_exact_values_as_often_as_they_say():
    """95% of the time, over games, shares that stay, and both ways to stop; 7,680 intervals."""
    held = []
    for seed, (keep, samples, tolerance) in product(range(10), ((0.0, 16, 0.1), (0.6, 16, 0.1), (0.6, 6, 0.0))):
        worth = game(seed, 8)
        exact_values = enumerated(worth, 8, 8 - math.ceil(8 * keep))
        for draw in range(32):
            found = shapley(worth, range(8), seed=draw, keep=keep, max_samples=samples, tolerance=tolerance)
            held += [abs(v - e) <= i for v, e, i in zip(found.values, exact_values, found.intervals, strict=True)]
    assert 0.93 < fmean(held) < 0.97
    # Were all 7,680 independent, chance would move the share by 0.25 percent (one standard error).


def test_quantiles_are_those_of_students_distribution():
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 60: 2.000}
    for freedom, quantile in tables.items():
        assert student(freedom) == pytest.approx(quantile, rel=2e-3)


def test_the_seed_decides_and_bad_options_are_refused():
    assert shapley(worth, PLAYERS, seed=3) == shapley(worth, PLAYERS, seed=3)
    assert shapley(worth, PLAYERS, seed=3, max_samples=2) != shapley(worth, PLAYERS, seed=4, max_samples=2)
    with pytest.raises(ConfigError, match="fewer than two"):
        shapley(worth, [0])
    for options in ({"max_samples": 1}, {"tolerance": -1.0}, {"keep": 1.0}):
        with pytest.raises(ConfigError, match="Shapley options"):
            shapley(worth, PLAYERS, **options)
