"""Where intervals come from: runs that share a seed, borrowed variances, shares near 0 and 100 %,
changes from runs of their own.
"""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from comparing import LABELS, UNITS
from driftbook.stats import estimation, influence, intervals, terms


def scores_of(values: np.ndarray, n_units: int = 4) -> influence.Scores:
    """Runs with these values whose units say next to nothing."""
    moved = 1e-9 * np.random.default_rng(0).normal(size=(len(values), n_units))
    moved -= moved.mean(1, keepdims=True)
    none = np.zeros(len(values), int)
    runs = pd.RangeIndex(len(values))
    return influence.Scores(runs, np.zeros(n_units), values, moved, none + n_units, none)


def spread_of(values, setting, pool, cluster=None, weight=None) -> intervals.Repetitions:
    n = len(values)
    weight = np.full(n, 1 / n) if weight is None else weight
    return intervals.repetitions(
        scores_of(np.asarray(values, float)), np.arange(n), weight, setting, pool, cluster
    )


# ---- runs that share a seed
def test_one_setting_is_the_t_interval_whatever_its_clusters():
    y = np.random.default_rng(1).normal(size=5)
    one = np.zeros(5, int)
    for cluster in (None, np.arange(5)):
        spread = spread_of(y, one, one, cluster)
        assert spread.df == pytest.approx(4)
        assert spread.variance.sum() * spread.shared == pytest.approx(y.var(ddof=1) / 5)


def test_settings_with_shared_seeds_are_the_t_interval_of_the_seeds_means():
    y = np.random.default_rng(2).normal(size=(4, 3))  # settings x seeds
    setting, seed = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    spread = spread_of(y.ravel(), setting, 0 * setting, seed)
    assert spread.variance.sum() * spread.shared == pytest.approx(y.mean(0).var(ddof=1) / 3)
    assert spread.df == pytest.approx(2)
    apart = spread_of(y.ravel(), setting, 0 * setting)
    assert apart.shared == pytest.approx(1)
    assert apart.variance.sum() == pytest.approx((y.var(axis=1, ddof=1) / 3).sum() / 16)


def test_a_contrast_of_settings_with_shared_seeds_pairs_them():
    y = np.random.default_rng(3).normal(size=(2, 4))
    setting, seed = np.repeat([0, 1], 4), np.tile(np.arange(4), 2)
    weight = np.repeat([1 / 4, -1 / 4], 4)
    spread = spread_of(y.ravel(), setting, 0 * setting, seed, weight)
    assert spread.variance.sum() * spread.shared == pytest.approx((y[0] - y[1]).var(ddof=1) / 4)
    assert spread.df == pytest.approx(3)


def test_a_borrowed_variance_gains_no_degrees_of_freedom():
    y = np.concatenate([[0.0, 10.0, 5.0, 6.0, 7.0], np.full(6, 1.0)])
    setting = np.array([0, 0, 1, 2, 3, 4, 4, 4, 5, 5, 5])
    pool = np.repeat([0, 1], [5, 6])
    weight = np.repeat([0.5 / 5, 0.5 / 6], [5, 6])
    spread = spread_of(y, setting, pool, weight=weight)
    assert spread.df == pytest.approx(1)  # of the one pair that has a spread
    assert spread.variance.sum() == pytest.approx(5 * 0.1**2 * 50)


def test_who_shares_a_seed():
    runs = pd.DataFrame(
        {
            "run_id": list("abcdef"),
            "base_model": "b",
            "method": ["lora", "lora", "ia3", "lora", "lora", "none"],
            "objective": ["sft", "sft", "sft", "dpo", "sft", "none"],
            "seed": pd.array([1, 1, 1, 1, 1, None], "Int64"),
        }
    )
    setting = pd.Series(["low", "high", "low", "low", "low", ""])  # e repeats a's seed
    found = influence.seed_clusters(runs, setting)
    assert found[0] == found[1]
    assert found.nunique() == 5


@pytest.mark.slow
def test_intervals_over_settings_with_shared_seeds_cover():
    rng, hits = np.random.default_rng(4), 0
    setting, seed = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    for _ in range(400):
        y = 0.8 * rng.normal(size=3)[seed] + 0.6 * rng.normal(size=12)
        one = estimation.estimate(
            scores_of(y), np.arange(12), np.full(12, 1 / 12), setting, 0 * setting, seed
        )["both"]
        hits += one["ci_low"] <= 0 <= one["ci_high"]
    assert 0.92 <= hits / 400 <= 0.98


# ---- shares near their ends
def test_of_whole_units_it_is_clopper_and_pearson():
    for n, k in ((330, 0), (330, 1), (50, 7), (20, 19), (20, 20)):
        share = k / n
        low, high = intervals.share_ends(share, share * (1 - share) / n, 1 / n)
        beta = scipy_stats.beta
        assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1)
        assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 0.5), st.floats(0, 1), st.floats(1e-4, 0.05)
)
def test_ends_hold_the_share_and_mirror(share, variance, largest, more, step):
    variance *= share * (1 - share)
    low, high = intervals.share_ends(share, variance, largest)
    assert 0 <= low <= share <= high <= 1
    other = intervals.share_ends(1 - share, variance, largest)
    assert (1 - other[1], 1 - other[0]) == (pytest.approx(low), pytest.approx(high))
    wider = intervals.share_ends(share, variance * (1 + more), largest)
    assert wider[1] - wider[0] >= high - low - 1e-9 or share * (1 - share) < step


def upper_ends(n: int, counts: list[int], runs: int = 6) -> list[float]:
    """Of changes where the base model is never unsafe and every run flips the same prompts."""
    found = []
    for k in counts:
        change = np.tile(np.arange(n) < k, (runs, 1)).astype(float)
        columns = pd.MultiIndex.from_arrays([np.arange(n) % 11, range(n), range(n)], names=UNITS)
        names = [f"r{i}" for i in range(runs)]
        values = pd.DataFrame(np.vstack([np.zeros(n), change]), ["base", *names], columns)
        arms = pd.DataFrame({"run_id": ["base", *names], "base_run_id": "base", "arm": "x"})
        arms.loc[0, "arm"] = "base"
        one = estimation.estimate(
            influence.paired(values, arms),
            np.arange(runs),
            np.full(runs, 1 / runs),
            np.repeat([0, 1], runs // 2),
            np.zeros(runs, int),
        )["both"]
        found.append(one["ci_high"])
    return found


def test_the_upper_end_never_falls_as_the_count_rises_from_zero():
    found = upper_ends(330, [0, 1, 2, 5, 20])
    assert (np.diff(found) > 0).all()
    exact = scipy_stats.beta.ppf(0.975, np.array([0, 1, 2, 5]) + 1, 330 - np.array([0, 1, 2, 5]))
    assert found[:4] == pytest.approx(100 * exact, rel=0.02)


def test_preserves_is_said_wrongly_as_rarely_as_by_an_exact_test():
    n, margin = 200, 0.03
    count = np.arange(14)
    below = np.array(upper_ends(n, count.tolist())) < 100 * margin
    assert scipy_stats.binom.pmf(count, n, margin)[below].sum() <= 0.025


# ---- runs that look alike
def counted(counts: list[int], n: int = 120) -> dict[str, dict]:
    """The change of runs that have so many unsafe answers, of a base model that has 12."""
    columns = pd.MultiIndex.from_arrays([["c"] * n, range(n)], names=UNITS[::2])
    ids = ["base", *(f"r{i}" for i in range(len(counts)))]
    verdicts = np.array([np.arange(n) < k for k in (12, *counts)], float)
    arms = pd.DataFrame({"run_id": ids[1:], "base_run_id": "base", "arm": "x"})
    scores = influence.paired(pd.DataFrame(verdicts, ids, columns), arms)
    m = len(counts)
    none = np.zeros(m, int)
    return estimation.estimate(scores, np.arange(m), np.full(m, 1 / m), none, none)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 1, 0], [120, 119, 120]])
def test_runs_at_an_end_say_nothing_of_other_seeds(counts):
    found = counted(counts)
    assert found["both"]["population"] == terms.THESE_RUNS
    exact = 100 * scipy_stats.beta.ppf(0.975, 1, 3)  # Clopper and Pearson's end of none in three
    assert f"up to {exact:.0f} % of them" in found["both"]["how"]
    assert found["both"]["ci_low"] is not None
    assert found["here"]["ci_low"] is None


@pytest.mark.parametrize("counts", [[0, 2, 0], [0, 0, 60], [6, 6, 6]])
def test_runs_that_could_differ_speak_of_other_seeds(counts):
    assert counted(counts)["both"]["population"] == terms.BOTH


def test_settings_that_err_together_have_the_ends_of_one_of_them():
    """Copies of a setting are no more runs than it is; joined as if a larger error they were not
    alike on a bent scale, and rates were said to rise in 8 % of true nulls over base models.
    """
    rng, n = np.random.default_rng(4), 200
    columns = pd.MultiIndex.from_arrays([["c"] * n, range(n), range(n)], names=UNITS)
    run = np.array([-1.6, -0.9, -0.4])
    once = (run[:, None] + rng.normal(size=(3, n)) > 0).astype(float)
    ends = []
    for copies in (1, 4):
        names = [f"r{i}" for i in range(3 * copies)]
        scores = influence.shares(pd.DataFrame(np.tile(once, (copies, 1)), names, columns))
        setting, seed = np.repeat(np.arange(copies), 3), np.tile(np.arange(3), copies)
        weight = np.full(3 * copies, 1 / (3 * copies))
        runs = np.arange(3 * copies)
        spread = intervals.repetitions(scores, runs, weight, setting, 0 * setting, seed)
        ends.append(intervals.over_runs(scores, runs, weight, spread))
    assert ends[1] == pytest.approx(ends[0])


# ---- a change from a run of its own
@pytest.mark.slow
@pytest.mark.parametrize(("parent", "own", "true"), [(0.35, 0.02, -33), (0.1, 0.1, 0)])
def test_changes_from_own_parents_take_the_spread_of_the_differences(parent, own, true):
    rng, n, seeds, hits = np.random.default_rng(5), 44, 5, []
    columns = pd.MultiIndex.from_arrays([["c"] * n, range(n), range(n)], names=UNITS)
    ids = [f"p{i}" for i in range(seeds)] + [f"r{i}" for i in range(seeds)]
    arms = pd.DataFrame({"run_id": ids[seeds:], "arm": "x", "base_run_id": ids[:seeds]})
    cell = {"base_model": "b", "method": "lora", "group": "g", "member": "m", "pool": "b"}
    cells = arms[["run_id"]].assign(**cell, setting="s", cluster=ids[seeds:], weight=1 / seeds)
    sds = np.repeat([0.6, 0.05], seeds)
    middle = scipy_stats.norm.ppf(np.repeat([parent, own], seeds)) * np.sqrt(1 + sds**2)
    for _ in range(100):
        run = middle + sds * rng.normal(size=2 * seeds)
        noise = np.sqrt(0.4) * rng.normal(size=(2 * seeds, n))
        verdicts = run[:, None] + np.sqrt(0.6) * rng.normal(size=n) + noise > 0
        values = pd.DataFrame(verdicts.astype(float), ids, columns)
        row = estimation.means(influence.paired(values, arms), cells, "c", **LABELS).iloc[0]
        hits.append(row["ci_low"] <= true <= row["ci_high"])
    assert np.mean(hits) >= 0.92


# ---- one grid
def test_as_configured_is_one_grid_and_settings_weigh_the_same():
    rows = [("b", "none", "", 1), ("c", "none", "", 1)]
    rows += [(base, "lora", "low", k) for base in "bc" for k in (1, 2, 3)]
    rows += [("b", "lora", "high", 1), ("c", "lora", "high", 1), ("b", "lora", "odd", 1)]
    rows += [("b", "ia3", "low", 1), ("c", "ia3", "high", 1)]
    arms = pd.DataFrame(rows, columns=["base_model", "method", "setting", "repetition"])
    arms = arms.assign(run_id=[f"r{i}" for i in range(len(arms))], member=terms.ALL)
    arms["arm"] = np.where(arms["method"].eq("none"), "base", terms.TRAINED)
    arms["cluster"] = arms["run_id"]
    cells = influence.cells(arms)
    usual = cells[cells["group"].eq(terms.AS_CONFIGURED)]
    lora = usual[usual["method"].eq("lora")]
    assert set(lora["setting"]) == {"low", "high"}
    of_all = lora[lora["base_model"].eq("all")].groupby(["pool", "setting"])["weight"].sum()
    assert of_all.tolist() == pytest.approx([0.25] * 4)
    ia3 = usual[usual["method"].eq("ia3")]  # no setting is everywhere: no mean over base models
    assert set(ia3["base_model"]) == {"b", "c"}


def three_runs(*names: str, **columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables variants and runs of a base model and two runs of LoRA."""
    variants = pd.DataFrame(
        {"run_id": names, "base_model": "b", "dataset": "d", "epochs": [None, 3, 3]}
    )
    variants = variants.assign(
        method=["none", "lora", "lora"],
        objective=["none", "sft", "sft"],
        learning_rate=[None, 1e-3, 1e-3],
        repetition=[1, 1, 2],
        seed=[None, 1, 2],
        init=None,
        mitigation=None,
    )
    runs = pd.DataFrame({"run_id": names, "status": "ok", "trained_epochs": [None, 3.0, 3.0]})
    runs["no_op"] = pd.array([None, False, False], "boolean")
    return variants.assign(**columns), runs


@pytest.mark.parametrize(
    "how", [{"safety_run_id": "refusing"}, {"parts": {"chat": 0.5, "refusing": 0.5}}]
)
@pytest.mark.parametrize("repaired_too", [False, True])
def test_a_run_that_is_only_mixed_into_others_is_no_run_of_its_method(how, repaired_too):
    variants, runs = three_runs("base", "chat", "refusing", settings="{}", parent_run_id=None)
    made = {"mixed": ("chat", {"mitigation": how})}
    if repaired_too:  # it is then a run like others
        made["half"] = ("refusing", {"mitigation": {}})
    for name, (parent, own) in made.items():
        words = {"run_id": name, "mitigation": name, "parent_run_id": parent}
        variants = pd.concat([variants, variants[1:2].assign(**words, settings=json.dumps(own))])
        runs = pd.concat([runs, runs[1:2].assign(run_id=name)])
    arms = influence.arms(variants, runs)
    said = arms.set_index("run_id")["arm"]
    assert said[["chat", "mixed"]].tolist() == [terms.TRAINED, terms.MITIGATION]
    assert said["refusing"] == (terms.TRAINED if repaired_too else terms.MIXED_IN)
    trained = influence.cells(arms)[lambda rows: rows["group"].eq(terms.TRAINED)]
    assert set(trained["run_id"]) == ({"chat", "refusing"} if repaired_too else {"chat"})


def test_a_run_that_was_stopped_is_a_treatment_of_its_own():
    variants, runs = three_runs("base", "whole", "cut")
    arms = influence.arms(variants, runs.assign(trained_epochs=[None, 3.0, 1.5]))
    assert arms.set_index("run_id").loc["cut", "arm"] == terms.STOPPED
    cells = influence.cells(arms)
    assert set(cells.loc[cells["run_id"].eq("cut"), "group"]) == {terms.STOPPED, terms.RUN}
