from itertools import permutations
from math import factorial

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.pruning.shapley import shapley

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
    found = shapley(worth, PLAYERS, max_samples=4000, tolerance=0.004)
    assert found.samples < 4000
    for value, error, expected in zip(found.values, found.errors, exact(), strict=True):
        assert abs(value - expected) < 4 * error
    assert max(found.errors) <= 0.004 * (max(found.values) - min(found.values))


def test_values_sum_up_to_what_the_whole_is_worth():
    for samples in (2, 3, 9):
        found = shapley(worth, PLAYERS, max_samples=samples, tolerance=0)
        assert found.samples == samples
        assert sum(found.values) == pytest.approx(worth(frozenset()) - worth(frozenset(PLAYERS)))


def test_without_interactions_every_sample_is_exact():
    found = shapley(lambda gone: sum(WEIGHTS[i] for i in PLAYERS if i not in gone), PLAYERS)
    assert found.values == pytest.approx(WEIGHTS)
    assert found.samples == 2  # the stop rule: no error is left


def test_large_shares_always_stay():
    seen = set()

    def watched(gone: frozenset[int]) -> float:
        seen.add(len(gone))
        return worth(gone)

    found = shapley(watched, PLAYERS, keep=0.5, max_samples=3)
    assert max(seen) == 2
    assert all(error < float("inf") or found.samples >= 3 for error in found.errors)


def test_the_seed_decides_and_bad_options_are_refused():
    assert shapley(worth, PLAYERS, seed=3) == shapley(worth, PLAYERS, seed=3)
    assert shapley(worth, PLAYERS, seed=3, max_samples=2) != shapley(worth, PLAYERS, seed=4, max_samples=2)
    with pytest.raises(ConfigError, match="fewer than two"):
        shapley(worth, [0])
    for options in ({"max_samples": 1}, {"tolerance": -1.0}, {"keep": 1.0}):
        with pytest.raises(ConfigError, match="Shapley options"):
            shapley(worth, PLAYERS, **options)
