"""Fronts, correlations and slopes against slow obvious versions, resampled prompts, known latent
values, statsmodels and published formulae.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import t

from driftbook.analyses import correlations, tradeoffs
from driftbook.analyses.correlations import CORRELATION, RELIABILITY, UNATTENUATED, WITHIN_METHODS
from driftbook.analyses.tradeoffs import (
    FRONT_BIAS,
    GOALS,
    LESS,
    MORE,
    NEARER_ZERO,
    SLOPE,
    SLOPE_WITHIN,
)
from driftbook.stats import influence, pareto, terms
from driftbook.stats.terms import ACCURACY_AMB, BIAS_AMB, BIAS_DIS, LOSS, REFUSED, UNSAFE
from driftbook.study.tables import TABLES
from simulated import simulate

LABELS = {"study": "s", "notebook": "n"}


def scores(items: np.ndarray, runs=None, strata=None) -> influence.Scores:
    """The mean of each run's items [runs, units]."""
    names = pd.Index(
        [f"r{i}" for i in range(len(items))] if runs is None else list(runs), dtype=object
    )
    asked = np.full(len(items), items.shape[1])
    return influence.ratio(
        items, np.ones(items.shape), names, strata or ["c"] * items.shape[1], asked, 0 * asked, 1.0
    )


def goals(base: list[np.ndarray], runs: list[np.ndarray], names: list[str]) -> dict:
    """Level and change of each goal, from the items of the base model [units] and of the runs
    [runs, units].
    """
    found, arms = {}, known(len(runs[0]))
    for i, (name, own, more) in enumerate(zip(names, base, runs, strict=True)):
        level = scores(
            np.vstack([own, more]), ["base", *arms["run_id"][1:]], [f"goal {i}"] * len(own)
        )
        found[name] = (level, influence.changes(level, arms))
    return found


def known(n_runs: int, methods="lora", settings=None) -> pd.DataFrame:
    run_ids = ["base", *(f"r{i}" for i in range(n_runs))]
    frame = pd.DataFrame(
        {
            "run_id": run_ids,
            "base_model": "b",
            "base_run_id": "base",
            "arm": ["base"] + [terms.TRAINED] * n_runs,
            "cluster": run_ids,
        }
    )
    return frame.assign(
        method=["none", *([methods] * n_runs if isinstance(methods, str) else methods)],
        setting=["", *(settings or ["s"] * n_runs)],
    )


def cells(arms: pd.DataFrame) -> pd.DataFrame:
    """A cell for each setting of a method."""
    own = arms[arms["arm"].ne("base")].assign(pool="b", group=terms.SETTINGS)
    own = own.assign(member=own["setting"])
    return own.assign(weight=1 / own.groupby(influence.CELL)["run_id"].transform("size"))


def fronts(measured, better, arms, n_draws=4000, seed=0) -> pd.DataFrame:
    return tradeoffs.fronts(
        measured, better, arms, cells(arms), n_draws, seed, outcome="front", **LABELS
    ).set_index(["method", "member"])


# ---- the front
def test_front_keeps_what_nothing_beats():
    points = np.array([[0, 3], [1, 1], [3, 0], [2, 2], [1, 1]])
    assert pareto.front(points).tolist() == [True, True, True, False, True]
    drawn = np.random.default_rng(0).integers(0, 4, (20, 7, 3))
    slow = [
        [not any((q <= p).all() and (q < p).any() for q in rows) for p in rows] for rows in drawn
    ]
    assert pareto.front(drawn).tolist() == slow


def test_probability_over_prompts_is_that_of_resampled_prompts():
    """Runs that repeat each other: all the uncertainty is that of prompts, which settings and the
    base model share.
    """
    rng, n = np.random.default_rng(1), 150
    base = [rng.exponential(size=n) for _ in range(3)]
    items = [
        np.repeat([0.5 * own + rng.exponential(0.5 + shift, n) for shift in shifts], 2, 0)
        for own, shifts in zip(
            base, ((-0.1, 0.1, 0.0), (0.1, -0.05, 0.0), (0.05, 0.1, 0.05)), strict=True
        )
    ]
    arms = known(6, settings=["x", "x", "y", "y", "z", "z"])
    found = fronts(goals(base, items, ["a", "b", "c"]), {"a": LESS, "b": LESS, "c": MORE}, arms)[
        "value"
    ].astype(float)
    picked = rng.integers(0, n, (4000, 3, n))
    points = [
        [
            np.zeros(4000),
            *(
                items[j][2 * k][picked[:, j]].mean(1) - base[j][picked[:, j]].mean(1)
                for k in range(3)
            ),
        ]
        for j in range(3)
    ]
    drawn = np.stack(
        [np.stack(column, -1) * sign for column, sign in zip(points, (1, 1, -1), strict=True)], -1
    )
    by_hand = 100 * pareto.front(np.round(drawn, 9)).mean(0)
    assert found.loc[
        [("none", "all"), *(("lora", name) for name in "xyz")]
    ].tolist() == pytest.approx(by_hand, abs=4)
    assert by_hand.min() < 90
    assert by_hand.max() > 10


def test_probability_over_runs_is_the_t_distribution_of_their_mean():
    """No prompt differs from another: one goal, so the setting is on the front where its mean is
    below zero, and the base model where it is above.
    """
    values = np.array([1.0, 4.0, -2.0])
    measured = goals([np.zeros(40)], [np.repeat(values[:, None], 40, 1)], ["a"])
    found = fronts(measured, {"a": LESS}, known(3), n_draws=20_000)["value"].astype(float)
    from scipy.stats import ttest_1samp

    above = 100 * ttest_1samp(values, 0, alternative="less").pvalue
    assert found[("lora", "s")] == pytest.approx(100 - above, abs=1.5)
    assert found[("none", "all")] == pytest.approx(above, abs=1.5)


@pytest.mark.parametrize("shared", [True, False])
def test_settings_that_share_seeds_are_drawn_with_their_covariance(shared):
    """The difference of two settings' means has the variance of paired or of independent runs."""
    n, rng = 12, np.random.default_rng(8)
    seed = rng.normal(size=n)
    x, y = seed + 0.3 * rng.normal(size=n), seed + 0.3 * rng.normal(size=n)
    setting, cluster = np.repeat([0, 1], n), np.tile(np.arange(n), 2)
    cluster = cluster if shared else np.arange(2 * n)
    weights = np.repeat(np.eye(2), n, axis=1) / n
    values, method = np.append(x, y)[:, None], np.full(2 * n, "lora", object)
    drawn, single = tradeoffs._over_runs(values, method, setting, cluster, weights, 20_000, rng)
    wide = np.sqrt((n - 1) / (n - 3))  # of t
    by_hand = (x - y).var(ddof=1) if shared else x.var(ddof=1) + y.var(ddof=1)
    difference = drawn[:, 0, 0] - drawn[:, 1, 0]
    assert difference.std() == pytest.approx(wide * np.sqrt(by_hand / n), rel=0.04)
    assert drawn[:, 0, 0].std() == pytest.approx(wide * x.std(ddof=1) / np.sqrt(n), rel=0.04)
    assert single == []


def test_noise_of_single_runs_counts_once():
    """Many runs with nothing but noise of run x prompt: what prompts like these add is nothing, so
    the drawn spread is that of the mean.
    """
    rng = np.random.default_rng(3)
    items = rng.normal(size=(40, 200))
    measured = goals([np.zeros(200)], [items], ["a"])
    own = cells(known(40))
    points, _ = tradeoffs.drawn_points(
        measured, {"a": LESS}, "base", own, measured["a"][1].value[:, None], 4000, rng
    )
    assert points[:, 1, 0].std() == pytest.approx(1 / np.sqrt(40 * 200), rel=0.2)
    assert not points[:, 0].any()


def test_a_bias_nearer_zero_is_better_whichever_its_sign():
    rng = np.random.default_rng(4)
    base = rng.normal(10, 1, 100)
    measured = goals(
        [base], [np.stack([base - shift for shift in (9.0, 9.0, 22.0, 22.0)])], ["bias"]
    )
    found = fronts(
        measured, {"bias": NEARER_ZERO}, known(4, settings=["near", "near", "across", "across"])
    )["value"]
    assert found.tolist() == [0, 100, 0]  # 10 for the base, then 1, then -12
    half = fronts(
        goals([base * 0.2], [np.stack([base * 0.2 - 4.1] * 2)], ["bias"]),
        {"bias": NEARER_ZERO},
        known(2),
    )["value"].astype(float)
    picked = rng.integers(0, 100, (4000, 100))
    level = (base * 0.2)[picked].mean(1)
    assert half[("none", "all")] == pytest.approx(
        100 * (np.abs(level) < np.abs(level - 4.1)).mean(), abs=4
    )


def test_equal_points_are_on_the_front_together():
    base = np.random.default_rng(5).random(50)
    measured = goals([base, base], [np.stack([base] * 4)] * 2, ["a", "b"])
    assert fronts(measured, {"a": LESS, "b": MORE}, known(4, settings=list("xxyy")))[
        "value"
    ].tolist() == [100, 100, 100]


def test_missing_goals_and_single_seeds_are_said():
    rng = np.random.default_rng(6)
    items = rng.random((4, 50))
    measured = goals([rng.random(50)], [items], ["a"])
    arms = known(4, methods=["lora", "lora", "ia3", "ia3"], settings=["x", "x", "x", "y"])
    found = fronts(measured, {"a": LESS, "never measured": MORE}, arms)
    assert found.loc[("lora", "x"), "population"] == terms.BOTH
    assert found.loc["ia3", "population"].eq(terms.THESE_RUNS).all()
    assert found["how"].str.contains("less a").all()
    assert not found["how"].str.contains("never measured").any()
    lost = {
        "a": tuple(
            replace(one, value=np.where(one.runs == "r0", np.nan, one.value))
            for one in measured["a"]
        )
    }
    found = fronts(lost, {"a": LESS}, arms)
    assert pd.isna(found.loc[("lora", "x"), "value"])
    assert "no score in one of the goals" in found.loc[("lora", "x"), "how"]
    assert found.loc["ia3", "value"].notna().all()
    assert fronts({}, {"a": LESS}, arms).empty
    gone = {
        "a": tuple(
            replace(one, value=np.where(one.runs == "r9", 0.0, np.nan)) for one in measured["a"]
        ),
        "b": measured["a"],
    }
    found = fronts(
        gone
        | {"a": (gone["a"][0], replace(gone["a"][1], value=np.append(np.full(3, np.nan), 1.0)))},
        {"a": LESS, "b": LESS},
        arms[:4],
    )
    assert found["value"].isna().all()
    assert (
        found.loc[("none", "all"), "how"] == "no cell has a score in all goals: there is no front"
    )


# ---- correlations
def latent(
    rng, n_runs=40, n_units=80, r=0.6, noise=(9.0, 9.0), shared=0.0, shift=0.0
) -> tuple[dict, pd.DataFrame]:
    """Changes in x and y of runs whose true changes correlate by `r` and have the SD 1, with the
    noise of units; `shift` sets methods apart.
    """
    method = np.repeat(np.arange(4), n_runs // 4)
    true = (
        rng.multivariate_normal([0, 0], [[1, r], [r, 1]], n_runs) + shift * (method - 1.5)[:, None]
    )
    common, own = rng.normal(size=(n_runs, n_units)), rng.normal(size=(2, n_runs, n_units))
    items = [
        true[:, [j]]
        + noise[j] * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own[j])
        + 5 * rng.normal(size=n_units)
        for j in (0, 1)
    ]
    strata = [["c"] * n_units, ["c" if shared else "d"] * n_units]
    methods = list(np.array(["lora", "ia3", "prompt_tuning", "p_tuning"])[method])
    arms = known(n_runs, methods, settings=[f"s{i}" for i in range(n_runs)])
    measured = {
        name: (None, scores(part, strata=strata[j]))
        for j, (name, part) in enumerate(zip(("x", "y"), items, strict=True))
    }
    return measured, arms


def correlated(measured, arms, n_boot=200) -> pd.DataFrame:
    found = correlations.correlations(measured, arms, "x", n_boot, 0, **LABELS)
    return found[found["outcome"].eq("y")].set_index("contrast")


RAW = CORRELATION


@pytest.mark.slow
def test_the_corrected_correlation_is_the_latent_one_and_its_interval_holds_it():
    rng, rows = np.random.default_rng(0), []
    for _ in range(70):
        rows.append(correlated(*latent(rng, noise=(6.0, 6.0)), n_boot=120))
    values = pd.DataFrame([row["value"].astype(float) for row in rows]).mean()
    reliability = 1 / (1 + 6**2 / 80)
    assert values[RELIABILITY] == pytest.approx(
        1 - (1 - reliability) * 39 / 37, abs=0.03
    )  # the mean of a ratio over 40 runs
    assert values[RAW] == pytest.approx(0.6 * reliability, abs=0.04)
    assert values[RAW + UNATTENUATED] == pytest.approx(0.6, abs=0.05)
    ends = (
        pd.DataFrame([row.loc[RAW + UNATTENUATED, ["ci_low", "ci_high"]] for row in rows])
        .dropna()
        .astype(float)
    )
    held = ends["ci_low"].le(0.6) & ends["ci_high"].ge(0.6)
    assert len(ends) > 56
    assert 0.84 <= held.mean() <= 0.99


def test_raw_correlations_are_numpys_and_within_methods_those_of_residuals():
    measured, arms = latent(np.random.default_rng(1), shift=3.0)
    found, frame = (
        correlated(measured, arms),
        pd.DataFrame({name: pair[1].value for name, pair in measured.items()}),
    )
    rest = frame - frame.groupby(arms["method"][1:].to_numpy()).transform("mean")
    assert found.loc[RAW, "value"] == pytest.approx(np.corrcoef(frame.T)[0, 1])
    assert found.loc[RAW + WITHIN_METHODS, "value"] == pytest.approx(np.corrcoef(rest.T)[0, 1])
    assert (
        found.loc[RAW, "value"] > 0.9 > found.loc[RAW + WITHIN_METHODS, "value"] + 0.2
    )  # methods differ in both
    reliable = {
        name: (
            1
            - (pair[1].influence - pair[1].influence.mean(0)).var(1, ddof=1).sum()
            * 80
            / 39
            / pair[1].value.var(ddof=1)
        )
        for name, pair in measured.items()
    }
    by_hand = found.loc[RAW, "value"] / np.sqrt(reliable["x"] * reliable["y"])
    assert found.loc[RAW + UNATTENUATED, "value"] == pytest.approx(by_hand, rel=1e-6)
    left = [np.corrcoef(frame.drop(index=i).T)[0, 1] for i in range(40)]
    half = jackknifed(left)
    low, high = np.tanh(np.arctanh(found.loc[RAW, "value"]) + np.array([-half, half]))
    assert found.loc[RAW, ["ci_low", "ci_high"]].tolist() == pytest.approx([low, high], abs=1e-6)


def jackknifed(left: list[float]) -> float:
    """Half the width of an interval for Fisher's z from correlations without each unit."""
    z = np.arctanh(left)
    pseudo = len(z) * z.mean() - (len(z) - 1) * z  # less a constant
    return t.ppf(0.975, len(z) - 1) * np.sqrt(pseudo.var(ddof=1) / len(z))


def test_settings_are_the_units_of_a_correlation_and_runs_where_a_method_has_one():
    measured, arms = latent(np.random.default_rng(11), shift=1.0)
    values = pd.DataFrame({name: pair[1].value for name, pair in measured.items()})
    arms["setting"] = ["", *(f"s{i // 2}" for i in range(40))]
    found = correlated(measured, arms).loc[RAW]
    left = [np.corrcoef(values.drop(index=[i, i + 1]).T)[0, 1] for i in range(0, 40, 2)]
    width = np.arctanh(found["ci_high"]) - np.arctanh(found["ci_low"])
    assert width / 2 == pytest.approx(jackknifed(left))
    assert "jackknife over 20 settings" in found["how"]
    one = correlated(measured, arms.assign(setting="s"))
    assert "jackknife over 4 settings" in one.loc[RAW, "how"]
    assert "jackknife over 40 settings" in one.loc[RAW + WITHIN_METHODS, "how"]
    two = correlated(measured, arms[arms["run_id"].isin(["base", *(f"r{i}" for i in range(6))])])
    assert two.loc[RAW, "how"] == "Pearson; no interval: 3 settings"
    assert pd.isna(two.loc[RAW, "ci_low"])


@pytest.mark.parametrize(("n_settings", "shared"), [(16, 0.8), (8, 0.8), (16, 0.0)])
def test_intervals_hold_the_correlation_of_runs_that_repeat_settings(n_settings, shared):
    rng, held = np.random.default_rng(12), []
    setting = np.repeat(np.arange(n_settings), 3)
    without = 1.0 - (np.arange(n_settings)[:, None] == setting)
    for _ in range(600):
        own, again = rng.normal(size=(2, n_settings)), rng.normal(size=(2, len(setting)))
        x, y = np.sqrt(shared) * own[:, setting] + np.sqrt(1 - shared) * again
        products = np.outer(x, x), np.outer(y, y), np.outer(x, y)
        group = np.zeros(len(x), int)
        xx, yy, xy = (correlations._within_groups(one, without, group) for one in products)
        found = correlations._raw(np.corrcoef(x, y)[0, 1], xy / np.sqrt(xx * yy))
        held.append(found["ci_low"] <= 0 <= found["ci_high"])
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.slow
def test_noise_that_two_scores_share_is_no_correlation():
    rng = np.random.default_rng(2)
    values = pd.DataFrame(
        [
            correlated(*latent(rng, r=0.0, shared=0.9), n_boot=20)["value"].astype(float)
            for _ in range(40)
        ]
    ).mean()
    assert values[RAW] > 0.35
    assert values[RAW + UNATTENUATED] == pytest.approx(0, abs=0.08)


def test_what_the_base_model_adds_to_all_runs_is_no_noise():
    measured, arms = latent(np.random.default_rng(3))
    base = 30 * np.random.default_rng(4).normal(size=80)
    shifted = {
        name: (None, replace(pair[1], influence=pair[1].influence - base / 80))
        for name, pair in measured.items()
    }
    left, right = correlated(measured, arms), correlated(shifted, arms)
    assert left["value"].astype(float).tolist() == pytest.approx(
        right["value"].astype(float).tolist()
    )


def test_what_cannot_be_corrected_says_so_and_is_never_cut():
    noisy = correlated(*latent(np.random.default_rng(5), noise=(60.0, 9.0)))
    assert noisy.loc[[RAW, RAW + WITHIN_METHODS], "value"].notna().all()
    assert noisy.loc[RAW + UNATTENUATED, "how"].startswith("cannot be corrected: reliabilities")
    assert pd.isna(noisy.loc[RAW + UNATTENUATED, "value"])
    rng = np.random.default_rng(6)
    rows = [
        correlated(*latent(rng, r=0.99, noise=(11.0, 11.0))).loc[RAW + UNATTENUATED]
        for _ in range(12)
    ]
    assert any("gives 1." in row["how"] and "beyond 1" in row["how"] for row in rows)
    assert all(
        row["how"].startswith("cannot be corrected: ") == pd.isna(row["value"]) for row in rows
    )
    ends = [row for row in rows if row["ci_high"] is not pd.NA and row["ci_high"] == 1]
    assert all("where it is cut" in row["how"] for row in ends)
    uncertain = [
        correlated(*latent(rng, noise=(16.0, 9.0))).loc[RAW + UNATTENUATED] for _ in range(8)
    ]
    assert any(
        "no interval: in" in row["how"] and pd.isna(row["ci_low"]) and pd.notna(row["value"])
        for row in uncertain
    )


def test_few_runs_and_no_spread_give_no_number():
    measured, arms = latent(np.random.default_rng(7), n_runs=8)
    three = correlated(measured, arms[arms["run_id"].isin(["base", "r0", "r3", "r5"])])
    assert three["value"].isna().all()
    assert three["how"].str.contains("3 runs").all()
    five = correlated(measured, arms[arms["run_id"].isin(["base", "r0", "r2", "r4", "r6", "r7"])])
    assert five.loc[RAW, "how"].startswith("Pearson")
    assert five.loc[RAW + WITHIN_METHODS, "how"] == "5 runs of 4 methods: too few for a correlation"
    flat = {"x": measured["x"], "y": (None, scores(np.ones((8, 80))))}
    found = correlated(flat, arms)
    assert found["value"].isna().all()
    assert found.loc[RAW, "how"] == "no correlation: one of the two changes is the same in all runs"
    assert correlations.correlations({"y": measured["y"]}, arms, "x", 10, 0, **LABELS).empty


# ---- cost against change
def test_single_runs_as_clusters_are_hc2_of_statsmodels():
    rng = np.random.default_rng(8)
    x, y = rng.random(20) * 3, rng.normal(size=20)
    found = tradeoffs.slope(x, y, np.zeros(20, int), np.arange(20))
    fit = sm.OLS(y, sm.add_constant(x)).fit(cov_type="HC2")
    assert (found["value"], found["se"]) == (
        pytest.approx(fit.params[1]),
        pytest.approx(fit.bse[1]),
    )
    group = np.repeat([0, 1], 10)
    within = sm.OLS(y, np.column_stack([x, group, 1 - group])).fit(cov_type="HC2")
    assert tradeoffs.slope(x, y, group, np.arange(20))["se"] == pytest.approx(within.bse[0])


def test_degrees_of_freedom_are_those_of_bell_and_mccaffrey():
    """Of the difference of two means with n and m observations (Imbens & Kolesar 2016, equation 8
    with equal variances).
    """
    n, m = 3, 12
    y = np.random.default_rng(9).normal(size=n + m)
    found = tradeoffs.slope(
        np.repeat([0.0, 1.0], [n, m]), y, np.zeros(n + m, int), np.arange(n + m)
    )
    df = (n + m) ** 2 * (n - 1) * (m - 1) / (n**2 * (n - 1) + m**2 * (m - 1))
    assert f"{df:.1f} degrees" in found["how"]


def test_slope_over_four_methods_covers_where_runs_of_a_method_go_together():
    rng, hits = np.random.default_rng(10), 0
    cost, method = np.repeat([3.0, 3.1, 3.9, 4.4], 12), np.repeat(np.arange(4), 12)
    for _ in range(300):
        y = 2 * cost + 3 * rng.normal(size=4)[method] + rng.normal(size=48)
        found = tradeoffs.slope(cost, y, np.zeros(48, int), method, "methods")
        hits += found["ci_low"] <= 2 <= found["ci_high"]
    assert 0.92 <= hits / 300 <= 0.995
    assert "few clusters" in found["how"]


def test_a_cost_that_hardly_differs_has_no_slope():
    y, one = np.arange(8.0), np.zeros(8, int)
    assert "factor of 1.3" in tradeoffs.slope(np.linspace(0, 0.1, 8), y, one, np.arange(8))["how"]
    assert (
        "2 methods"
        in tradeoffs.slope(np.linspace(0, 1, 8), y, one, np.repeat([0, 1], 4), "methods")["how"]
    )
    assert (
        "within methods"
        in tradeoffs.slope(np.repeat([0.0, 1.0], 4), y, np.repeat([0, 1], 4), np.arange(8))["how"]
    )
    exact = tradeoffs.slope(np.linspace(0, 1, 8), np.linspace(0, 3, 8) * 0, one, np.arange(8))
    assert exact["value"] == pytest.approx(0)
    assert "no interval" in exact["how"]


# ---- on a study's tables
@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    folder = (
        simulate(
            tmp_path_factory.mktemp("tradeoffs"), bases=["mini-llama", "mini-qwen2"], seeds=[1, 2]
        )
        / "tables"
    )
    frames = {
        name: TABLES[name].read(folder)
        for name in ("variants", "runs", "verdicts", "prompts", "answers", "ratings")
    }
    return {**frames, "arms": influence.arms(frames["variants"], frames["runs"])}


def measured_of(study, **instead) -> dict:
    return tradeoffs.measured(
        *(
            {**study, **instead}[name]
            for name in ("verdicts", "prompts", "answers", "ratings", "arms")
        )
    )


def test_everything_is_measured_and_estimated_once(study):
    measured, every = measured_of(study), influence.cells(study["arms"])
    assert {UNSAFE, REFUSED, ACCURACY_AMB, BIAS_AMB, BIAS_DIS, LOSS} <= set(measured)
    asked = (
        study["verdicts"]
        .merge(study["prompts"], on=["benchmark", "prompt_id"])
        .query("benchmark == 'over_refusal' and kind == 'benign look-alike'")
    )
    rate = asked.assign(refusal=asked["refusal"].astype(float)).groupby("run_id")["refusal"].mean()
    change = tradeoffs.run_changes(measured)[REFUSED].dropna()
    base = study["arms"].set_index("run_id").loc[change.index, "base_run_id"]
    assert change.tolist() == pytest.approx(
        (100 * (rate.loc[change.index].to_numpy() - rate.loc[base].to_numpy())).tolist()
    )
    settings = every[every["group"].eq(terms.SETTINGS)]
    parts = [
        tradeoffs.fronts(measured, better, study["arms"], settings, 200, 0, outcome=name, **LABELS)
        for name, better in GOALS.items()
    ]
    parts.append(correlations.correlations(measured, study["arms"], UNSAFE, 50, 0, **LABELS))
    parts.append(
        tradeoffs.slopes(
            measured[UNSAFE][1],
            study["arms"],
            study["runs"],
            outcome=UNSAFE,
            benchmark="safety",
            judge="j",
            **LABELS,
        )
    )
    found = TABLES["estimates"].concat(parts)  # checks the keys
    assert found.loc[found["outcome"].eq(FRONT_BIAS), "value"].between(0, 100).all()
    cost = found[found["against"].eq("trainable parameters")].set_index("contrast")["value"]
    assert cost[SLOPE].notna().all()
    assert cost[SLOPE_WITHIN].isna().all()
    intervals = found.dropna(subset=["ci_low"])
    assert (intervals["ci_low"] <= intervals["value"]).all()
    assert (intervals["value"] <= intervals["ci_high"]).all()


def test_a_study_without_scores_has_no_trade_off_and_no_error(study):
    silent = study["verdicts"].assign(unsafe=pd.array([None] * len(study["verdicts"]), "boolean"))
    measured = measured_of(study, verdicts=silent, ratings=study["ratings"][:0])
    assert np.isnan(measured[UNSAFE][1].value).all()
    assert LOSS not in measured
    settings = influence.cells(study["arms"]).query("group == @terms.SETTINGS")
    found = tradeoffs.fronts(
        measured, GOALS[terms.FRONT], study["arms"], settings, 50, 0, outcome=terms.FRONT, **LABELS
    )
    assert not found["how"].str.contains("unsafe").any()
    assert found["value"].notna().all()
    assert (
        correlations.correlations(measured, study["arms"], UNSAFE, 10, 0, **LABELS)["value"]
        .isna()
        .all()
    )
    nothing = measured_of(
        study, verdicts=silent[:0], answers=study["answers"][:0], ratings=study["ratings"][:0]
    )
    assert nothing == {}
    assert tradeoffs.fronts(
        nothing, GOALS[terms.FRONT], study["arms"], settings, 50, 0, outcome=terms.FRONT, **LABELS
    ).empty
