"""Tests and intervals that hold at every look, against enumeration, simulation, and confseq, the
package of the method's authors.
"""

from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from conftest import one_sentence
from driftbook.stats import sequential
from driftbook.stats.confidence import ALPHA

# what confseq 0.0.11 gives for x = 1, 1/2, 1/2, 0, 1/2, 1/2, 1/2 over and over, 140 items:
# betting_mart(x, m, theta=0.5, N=N) after 50 and 140 items, and betting_cs(x, breaks=2000) at 140
CYCLE = np.tile([1, 0.5, 0.5, 0, 0.5, 0.5, 0.5], 20)
MARTINGALES = {
    (0.4, None): (15.6823466353, 469.194046446),
    (0.4, 160): (39.9758695292, np.inf),
    (0.5, None): (0.11983231035, 0.0372481598661),
    (0.5, 160): (0.128153893092, 0.0480052939887),
    (0.55, None): (0.49242617036, 2.71875699206),
    (0.55, 160): (0.710458029493, 164.842591506),
}
ENDS = (0.4335, 0.5715)


def capital(x, mean, population=None) -> tuple[np.ndarray, np.ndarray]:
    """K+ and K- after each item at one candidate mean."""
    parts = sequential.log_capital(np.asarray(x, float), np.array([mean]), ALPHA, population)
    return tuple(np.exp(np.concatenate(side)[:, 0]) for side in zip(*parts, strict=True))


def at_most(hits: int, n: int, share: float = ALPHA) -> bool:
    """Whether so many hits are no more than chance (1 in 10,000) makes of this share."""
    return hits <= binom.ppf(1 - 1e-4, n, share)


# ---- bets on a coin
def by_hand(sides: tuple[int, ...], prior: float) -> list[float]:
    """The e-value after each discordant pair, bet by bet."""
    found, e, counts = [], 1.0, [0, 0]
    for side in sides:
        e *= 2 * (prior + counts[side]) / (2 * prior + sum(counts))
        counts[side] += 1
        found.append(e)
    return found


@pytest.mark.parametrize("prior", [0.5, 1.0, 8.0])
def test_an_e_value_is_a_product_of_bets_with_mean_one_that_rarely_grows(prior):
    n = 12
    e = np.array([by_hand(sides, prior) for sides in product((0, 1), repeat=n)])
    sides = np.array(list(product((0, 1), repeat=n)))
    found = sequential.e_values(np.cumsum(sides == 0, 1), np.cumsum(sides == 1, 1), prior)
    assert found == pytest.approx(e, rel=1e-10)
    assert found.mean(0) == pytest.approx(np.ones(n))  # over all sequences, which are as likely
    assert 0 < (found.max(1) >= 1 / ALPHA).mean() <= ALPHA or prior > 1


def test_an_e_value_has_mean_at_most_one_in_a_benchmark_without_replacement():
    orders = np.array(sorted(set(permutations([0] * 4 + [1] * 4))))
    means = sequential.e_values(np.cumsum(orders == 0, 1), np.cumsum(orders == 1, 1)).mean(0)
    assert means[0] == pytest.approx(1)
    assert (np.diff(means) <= 1e-12).all()
    assert means[-1] < 0.9


# ---- bets on a mean
def test_the_capital_is_that_of_confseq():
    for (mean, population), expected in MARTINGALES.items():
        up, down = capital(CYCLE, mean, population)
        assert (np.maximum(up, down) / 2)[[49, 139]] == pytest.approx(expected, rel=1e-9)
    low, high = sequential.confidence_sequence(CYCLE)
    assert (low[-1], high[-1]) == pytest.approx(ENDS, abs=1e-9)


def test_confseq_itself_gives_the_same_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # which its 0.0.11 asks for
    betting = pytest.importorskip("confseq.betting")
    x = (1 + np.random.default_rng(0).choice([-1, 0, 1], 300, p=[0.1, 0.75, 0.15])) / 2
    for mean, population in ((0.45, None), (0.52, None), (0.52, 700)):
        expected = betting.betting_mart(x, mean, ALPHA, N=population, theta=0.5)
        assert np.maximum(*capital(x, mean, population)) / 2 == pytest.approx(expected)


def test_the_capital_at_the_true_mean_is_a_martingale():
    values, chances = np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.5, 0.3])
    means = np.zeros((2, 6))
    for picks in product(range(3), repeat=6):
        means += np.prod(chances[list(picks)]) * np.array(
            capital(values[list(picks)], chances @ values)
        )
    assert means == pytest.approx(np.ones((2, 6)))


def test_the_capital_of_a_benchmark_in_random_order_is_a_martingale():
    items = np.array([0, 0.5, 0.5, 1, 1, 0.5])
    every = [capital(order, items.mean(), len(items)) for order in permutations(items)]
    assert np.mean(every, axis=0) == pytest.approx(np.ones((2, len(items))))


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60),
    st.sampled_from([None, 0, 30]),
)
def test_capitals_are_monotone_in_the_mean_and_intervals_narrow(x, more):
    population = None if more is None else len(x) + more
    parts = sequential.log_capital(np.array(x), sequential.GRID, ALPHA, population)
    up, down = (np.concatenate(side) for side in zip(*parts, strict=True))
    with np.errstate(invalid="ignore"):  # infinite less infinite is a step of nothing
        assert (np.nan_to_num(np.diff(up, axis=1)) <= 1e-9).all()
        assert (np.nan_to_num(np.diff(down, axis=1)) >= -1e-9).all()
    low, high = sequential.confidence_sequence(x, ALPHA, population)
    assert (np.diff(low) >= 0).all()
    assert (np.diff(high) <= 0).all()
    assert (low <= high).all()
    if more == 0:
        assert low[-1] - 1e-9 <= np.mean(x) <= high[-1] + 1e-9


# ---- error rates over all looks
def test_false_alarms_of_the_e_value_over_all_looks():
    rng, n, sets = np.random.default_rng(1), 600, 4000
    change = rng.choice([-1, 0, 1], (sets, n), p=[0.1, 0.8, 0.1])
    b, c = np.cumsum(change < 0, 1), np.cumsum(change > 0, 1)
    assert at_most((sequential.e_values(b, c).max(1) >= 1 / ALPHA).sum(), sets)
    z = np.abs(b - c) / np.sqrt(np.maximum(b + c, 1))  # McNemar's test, looked at again and again
    assert ((z >= 1.96) & (b + c >= 25)).any(1).mean() > 3 * ALPHA


@pytest.mark.parametrize("population", [None, 400])
@pytest.mark.parametrize("chances", [(0.1, 0.8, 0.1), (0.01, 0.96, 0.03), (0.3, 0.3, 0.4)])
def test_the_interval_holds_at_all_looks_together(population, chances):
    rng, n, sets = np.random.default_rng(2), 400, 400
    fixed = (1 + np.repeat([-1, 0, 1], np.round(np.array(chances) * n).astype(int))) / 2
    truth, missed = fixed.mean(), 0
    for _ in range(sets):
        x = rng.permutation(fixed) if population else rng.choice(fixed, n)
        missed += np.maximum(*capital(x, truth, population)).max() >= 2 / ALPHA
    assert at_most(missed, sets)


def test_an_effect_is_found_early():
    rng = np.random.default_rng(3)
    base = rng.random(3000) < 0.8
    candidate = base & (rng.random(3000) > 0.1)
    found = sequential.monitor(base, candidate).set_index("n_items")
    assert found["word"].ne("worse").loc[:50].all()
    assert found["word"].eq("worse").loc[500:].all()
    assert found["p"].loc[500] < ALPHA


# ---- two models, watched
BASE, CANDIDATE = [1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1]


def test_a_look_counts_what_came_so_far():
    found = sequential.monitor(BASE, CANDIDATE, looks=[2, 8])
    assert found["n_base_only"].tolist() == [1, 2]
    assert found["n_candidate_only"].tolist() == [0, 1]
    assert found["difference"].tolist() == [-50.0, -12.5]
    assert found["e_value"].tolist() == pytest.approx([1.0, 2**3 * 2 / 24])  # B(3, 2) = 1 / 12
    assert found["word"].tolist() == ["cannot tell"] * 2
    every = sequential.monitor(BASE, CANDIDATE).iloc[[1, 7]].reset_index(drop=True)
    pd.testing.assert_frame_equal(every, found)


def test_the_other_way_round_is_the_mirror_image():
    rng = np.random.default_rng(4)
    base, candidate = rng.random((2, 200)) < 0.7
    one, other = sequential.monitor(base, candidate), sequential.monitor(candidate, base)
    assert one["difference"].to_numpy() == pytest.approx(-other["difference"].to_numpy())
    assert one["ci_low"].to_numpy() == pytest.approx(-other["ci_high"].to_numpy())
    assert one["e_value"].to_numpy() == pytest.approx(other["e_value"].to_numpy())
    lower = sequential.monitor(candidate, base, higher_is_better=False)
    assert lower["word"].tolist() == one["word"].tolist()


def test_a_whole_benchmark_closes_on_its_own_difference():
    rng = np.random.default_rng(5)
    base, candidate = (rng.random((2, 1000)) < 0.6).astype(float)
    found = sequential.monitor(base, candidate, population=1000)
    last, truth = found.iloc[-1], 100 * (candidate - base).mean()
    assert last["ci_low"] - 1e-9 <= truth <= last["ci_high"] + 1e-9
    assert last["ci_high"] - last["ci_low"] < 0.5
    half = found.iloc[499]
    alone = sequential.monitor(base[:500], candidate[:500]).iloc[-1]
    assert half["ci_high"] - half["ci_low"] < alone["ci_high"] - alone["ci_low"]


def test_scores_that_are_no_answers_bet_on_their_mean():
    rng = np.random.default_rng(6)
    base, candidate = rng.random((2, 300))
    found = sequential.monitor(base, candidate)
    up, down = capital((1 + candidate - base) / 2, 0.5)
    assert found["e_value"].to_numpy() == pytest.approx((up + down) / 2)


WRONG = [
    (([1, 0], [1]), {}, "2 scores of the base and 1 of the candidate"),
    (([], []), {}, "0 scores"),
    (([1, None], [1, 0]), {}, "1 of 2 items have no score"),
    (([1, 7], [1, 0]), {}, "from 0 to 1"),
    (([1, 0], [1, 0]), {"looks": [2, 1]}, "ascending order, from 1 to 2"),
    (([1, 0], [1, 0]), {"looks": [3]}, "from 1 to 2"),
    (([1, 0], [1, 0]), {"population": 1}, "population=1, but 2 items"),
    (([1, 0], [1, 0]), {"margin": 0}, "percentage points above 0"),
]


@pytest.mark.parametrize(("sides", "more", "said"), WRONG)
def test_what_cannot_be_watched_is_said_in_a_sentence(sides, more, said):
    with pytest.raises(ValueError, match=said) as error:
        sequential.monitor(*sides, **more)
    assert one_sentence(error.value)
    with pytest.raises(ValueError, match="above 0"):
        sequential.e_values(1, 2, prior=0)
