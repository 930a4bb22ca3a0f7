"""The primary interval against slow and exact versions and known truth; contrasts, families of
tests, "preserves", odds ratios, Cliff's delta.
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import linalg
from scipy import stats as scipy_stats
from scipy.special import ndtr

from comparing import LABELS, UNITS, draw, made
from driftbook.analyses import outcomes
from driftbook.stats import comparisons, estimation, influence, intervals, terms
from driftbook.study.tables import ESTIMATES, TABLES
from simulated import simulate


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Arms, cells and unsafe values (runs x units in families) of a simulated study of two base
    models.
    """
    folder = (
        simulate(
            tmp_path_factory.mktemp("comparisons"),
            bases=["mini-llama", "mini-mistral"],
            utility=False,
        )
        / "tables"
    )
    arms = influence.arms(TABLES["variants"].read(folder), TABLES["runs"].read(folder))
    verdicts = (
        TABLES["verdicts"]
        .read(folder)
        .merge(TABLES["prompts"].read(folder), on=["benchmark", "prompt_id"])
    )
    return (
        arms,
        influence.cells(arms),
        influence.matrix(verdicts[verdicts["benchmark"].eq("safety")], "unsafe", UNITS),
    )


# ---- units
def test_variance_over_families_is_cr2_in_full():
    rng = np.random.default_rng(0)
    strata, family = (
        np.repeat([0, 1], [22, 18]),
        np.repeat(np.arange(9), [3, 4, 5, 10, 2, 2, 6, 7, 1]),
    )
    y = rng.normal(size=40) + rng.normal(size=9)[family]
    x = np.eye(2)[strata]
    hat = x @ np.linalg.inv(x.T @ x) @ x.T
    to_mean, rest, square, parts = x.mean(0) @ np.linalg.inv(x.T @ x) @ x.T, y - hat @ y, 0.0, []
    for one in range(9):
        own = family == one
        adjust = linalg.fractional_matrix_power(
            np.eye(own.sum()) - hat[np.ix_(own, own)], -0.5
        ).real
        weights = np.zeros(40)
        weights[own] = to_mean[own] @ adjust
        square += (weights @ rest) ** 2
        parts.append(weights @ (np.eye(40) - hat))
    covariance = np.array(parts) @ np.array(parts).T
    found = influence._clusters(strata, family)
    assert found.variance((y - y.mean()) / 40)[0] == pytest.approx(square)
    assert found.df == pytest.approx(np.trace(covariance) ** 2 / (covariance**2).sum())


def test_null_families_are_single_prompts_and_the_row_says_families(study):
    arms, cells, values = study
    rows = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS)
    assert (
        rows.loc[rows["contrast"].eq(terms.CHANGE), "population"]
        .str.contains("families of prompts like these")
        .all()
    )
    frame = pd.DataFrame(
        {
            "run_id": "r",
            "category": "c",
            "family": pd.array(["x", None, None]),
            "prompt_id": ["1", "2", "3"],
            "unsafe": [True, False, True],
        }
    )
    assert set(influence.matrix(frame, "unsafe", UNITS).columns.get_level_values("family")) == {
        "x",
        "2",
        "3",
    }


def test_families_that_agree_widen_the_interval():
    verdicts = draw(1, family=6)
    rows = []
    for family in (None, list(np.arange(120) // 6)):
        values, arms, cells = made(verdicts, ["lora"] * 6, ["a"] * 6, family=family)
        scores = influence.paired(values, arms)
        rows.append(
            estimation.means(
                scores if family else replace(scores, family=None), cells, terms.CHANGE, **LABELS
            ).iloc[0]
        )
    assert rows[1]["se"] > rows[0]["se"]
    assert rows[0]["population"] == terms.BOTH


# ---- runs
def test_interval_of_shares_is_the_t_interval_where_runs_are_many_and_far_from_the_ends():
    verdicts = (
        np.random.default_rng(2).random((61, 4000))
        < np.random.default_rng(3).normal(0.5, 0.02, (61, 1))
    ).astype(float)
    verdicts[0] = 0
    values, arms, cells = made(verdicts, ["lora"] * 60, ["a"] * 60)
    row = (
        estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS)
        .set_index("contrast")
        .loc[terms.CHANGE_HERE]
    )
    expected = scipy_stats.ttest_1samp(100 * verdicts[1:].mean(1), 0).confidence_interval()
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(list(expected), abs=0.1)


def test_interval_near_zero_reaches_up_and_not_down():
    verdicts = np.zeros((4, 200))
    for row, k in zip(verdicts[1:], (0, 2, 30), strict=True):
        row[:k] = 1
    values, arms, cells = made(verdicts, ["lora"] * 3, ["a"] * 3)
    row = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS).iloc[0]
    assert row["ci_high"] - row["value"] > 2 * (row["value"] - row["ci_low"])
    assert "1 of 3 runs at 0 or 100 %" in row["how"]


@pytest.mark.slow
def test_laws_of_the_interval(study):
    arms, cells, values = study
    rows = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS).dropna(
        subset="p"
    )
    wide = rows.pivot_table(
        index=influence.CELL, columns="contrast", values=["ci_low", "ci_high"]
    ).dropna()
    assert (wide["ci_low", terms.CHANGE] <= wide["ci_low", terms.CHANGE_HERE] + 1e-9).all()
    assert (wide["ci_high", terms.CHANGE_HERE] <= wide["ci_high", terms.CHANGE] + 1e-9).all()
    assert (rows["p"].lt(0.05) == (rows["ci_low"].gt(0) | rows["ci_high"].lt(0))).all()
    assert (rows["ci_low"] < rows["value"]).all()


def test_implied_df_is_the_inverse_of_the_t_quantile():
    df = np.array([1, 2, 3.7, 20, 400])
    assert intervals.implied_df(scipy_stats.t.ppf(0.975, df)) == pytest.approx(df, rel=1e-6)
    assert intervals.implied_df(1.5) == 1e9


# ---- contrasts
def test_difference_between_methods_pairs_prompts_and_caps_df_by_the_smaller_arm():
    verdicts = draw(4, runs=9)
    values, arms, cells = made(verdicts, ["lora"] * 3 + ["ia3"] * 6, ["a"] * 9)
    scores = influence.paired(values, arms)
    row = comparisons.between(scores, cells, **LABELS).iloc[0]
    both = 100 * (verdicts[1:4].mean(0) - verdicts[4:].mean(0))
    assert (row["contrast"], row["against"]) == (comparisons.DIFFERENCE, "ia3")
    assert row["value"] == pytest.approx(both.mean())
    weight = np.repeat([1 / 3, -1 / 6], [3, 6])
    spread = intervals.repetitions(
        scores, np.arange(9), weight, np.repeat([0, 1], [3, 6]), np.repeat([0, 1], [3, 6])
    )
    by_hand = [
        100**2 * verdicts[rows].mean(1).var(ddof=1) / len(verdicts[rows])
        for rows in (slice(1, 4), slice(4, 10))
    ]
    assert spread.variance == pytest.approx(by_hand)
    assert spread.df <= 2
    unit = both.var(ddof=1) / 120
    assert row["se"] ** 2 == pytest.approx(
        max(unit, spread.noise.sum()) + max((spread.variance - spread.noise).sum(), 0.0)
    )


def test_equal_methods_do_not_differ_though_both_changed():
    half = draw(5, runs=3)
    values, arms, cells = made(np.vstack([half, half[1:]]), ["lora"] * 3 + ["ia3"] * 3, ["a"] * 6)
    row = comparisons.between(influence.paired(values, arms), cells, **LABELS).iloc[0]
    assert row["value"] == pytest.approx(0, abs=1e-9)
    assert row["p"] == pytest.approx(1)


def test_interactions_add_up_to_nothing_and_a_single_base_model_has_none(study):
    arms, cells, values = study
    rows = comparisons.interactions(influence.paired(values, arms), cells, **LABELS)
    assert rows.groupby(influence.CELL[1:])["value"].sum().abs().max() < 1e-9
    assert set(rows["contrast"]) == {comparisons.INTERACTION}
    assert comparisons.interactions(*_one(study), **LABELS).empty


def _one(study):
    arms, _, values = study
    own = arms[arms["base_model"].eq("mini-llama")]
    return influence.paired(values, own), influence.cells(own)


def test_settings_are_compared_at_equal_other_settings(study):
    arms, _, values = study
    scores = influence.paired(values, arms)
    rows = comparisons.settings(scores, arms, **LABELS).set_index(
        ["base_model", "method", "contrast"]
    )["value"]
    change = pd.Series(scores.value, index=scores.runs)
    own = arms[
        arms["base_model"].eq("mini-llama")
        & arms["method"].eq("lora")
        & arms["arm"].isin([terms.TRAINED, terms.NO_OP])
    ]
    means = (
        own.assign(value=own["run_id"].map(change))
        .groupby(["objective", "learning_rate", "epochs"], dropna=False)["value"]
        .mean()
        .reset_index()
    )
    pairs = means.merge(means, on=["learning_rate", "epochs"]).query(
        "objective_x == 'sft' and objective_y == 'dpo'"
    )
    assert rows["mini-llama", "lora", comparisons.OBJECTIVE] == pytest.approx(
        (pairs["value_x"] - pairs["value_y"]).mean()
    )
    every = rows.xs((comparisons.OBJECTIVE, "lora"), level=("contrast", "method"))
    assert every["all"] == pytest.approx(every.drop("all").mean())


def test_prediction_for_a_new_base_model_is_the_t_interval_for_one_more():
    values = [3.0, 5.0, 10.0, 4.0]
    rows = estimation.complete(
        pd.DataFrame(
            {
                **LABELS,
                "base_model": list("wxyz"),
                "method": "lora",
                "group": terms.TRAINED,
                "contrast": terms.CHANGE,
                "value": values,
                "n_runs": 3,
                "n_items": 9,
                "n_unscored": 0,
                "population": "p",
                "how": "h",
            }
        )
    )
    row = comparisons.new_base(rows).iloc[0]
    half = scipy_stats.t.ppf(0.975, 3) * np.std(values, ddof=1) * np.sqrt(1.25)
    assert row[["value", "ci_low", "ci_high"]].tolist() == pytest.approx(
        [5.5, 5.5 - half, 5.5 + half]
    )
    assert row["n_runs"] == 12
    single = comparisons.new_base(rows.head(1)).iloc[0]
    assert pd.isna(single["ci_low"])
    assert "nothing is known" in single["how"]


# ---- families of tests
def with_p(p: list) -> pd.DataFrame:
    return estimation.complete(
        pd.DataFrame(
            {
                **LABELS,
                "base_model": "all",
                "method": [f"m{i}" for i in range(len(p))],
                "group": "g",
                "contrast": terms.CHANGE,
                "p": pd.array(p, "Float64"),
                "population": "p",
                "how": "h",
            }
        )
    )


def test_adjusted_p_values_are_rs(shared):
    for name, key in (("run_category", "lmm_run_category_contr"), ("small_items", "small_contr")):
        theirs = json.loads((shared / "reference" / f"{name}.json").read_text())[key]
        p = 2 * scipy_stats.t.sf(np.abs(_ratios(theirs["pairs_holm"])), _df(theirs["pairs_holm"]))
        for adjusted, kind in (
            (comparisons.declared, "pairs_holm"),
            (comparisons.screen, "pairs_BH"),
        ):
            found = adjusted(with_p(list(p)), "family")
            assert found["p_adjusted"].to_numpy(float) == pytest.approx(
                theirs[kind]["p.value"], rel=1e-5, abs=1e-14
            )
            assert found["family_of_tests"].eq("family").all()


def _ratios(table: dict) -> list[float]:
    return table["t.ratio"] if "t.ratio" in table else table["z.ratio"]


def _df(table: dict) -> np.ndarray:
    return np.array([np.inf if value == "Inf" else value for value in table["df"]], float)


def test_a_declared_test_without_p_counts_and_one_of_a_screen_does_not():
    rows = with_p([0.01, 0.04, None])
    assert comparisons.declared(rows, "f")["p_adjusted"].tolist()[:2] == pytest.approx([0.03, 0.08])
    assert comparisons.screen(rows, "f")["p_adjusted"].tolist()[:2] == pytest.approx([0.02, 0.04])
    assert comparisons.declared(rows, "f")["p_adjusted"].isna().tolist() == [False, False, True]


@pytest.mark.slow
def test_screens_are_by_outcome_and_base_model(study):
    arms, cells, values = study
    found = comparisons.screens(estimation.of_rate(values, arms, cells, **LABELS))
    assert set(found["base_model"]) == {"all", "mini-llama", "mini-mistral"}
    assert found.groupby("base_model")["family_of_tests"].nunique().eq(1).all()
    assert (found["p_adjusted"] >= found["p"]).all()


# ---- odds ratios
def test_odds_ratio_of_one_run_is_the_marginal_one_of_gee():
    verdicts = draw(6, runs=1)
    values, arms, cells = made(verdicts, ["lora"], ["a"])
    row = comparisons.odds_ratios(values, arms, cells, **LABELS).iloc[0]
    x = np.column_stack([np.ones(240), np.repeat([0, 1], 120)])
    fit = sm.GEE(
        verdicts.ravel(), x, np.tile(np.arange(120), 2), family=sm.families.Binomial()
    ).fit()
    assert np.log(row["value"]) == pytest.approx(fit.params[1])
    assert row["se"] == pytest.approx(fit.bse[1] * np.sqrt(120 / 119))
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_odds_ratio_over_base_models_is_the_geometric_mean(study):
    arms, cells, values = study
    rows = comparisons.odds_ratios(values, arms, cells, **LABELS)
    own = (
        rows[rows["method"].eq("lora") & rows["group"].eq(terms.TRAINED)]
        .set_index("base_model")["value"]
        .astype(float)
    )
    assert own["all"] == pytest.approx(np.sqrt(own["mini-llama"] * own["mini-mistral"]))


def test_odds_at_an_end_have_no_ratio():
    verdicts = draw(7, runs=2)
    verdicts[0] = 0
    values, arms, cells = made(verdicts, ["lora"] * 2, ["a"] * 2)
    row = comparisons.odds_ratios(values, arms, cells, **LABELS).iloc[0]
    assert pd.isna(row["value"])
    assert "at 0 or 100 percent" in row["how"]


# ---- Cliff's delta
def test_cliffs_delta_is_rs_effsize():
    """The example of R's effsize 0.8.1, cliff.delta, and its output."""
    found = comparisons.two_samples(
        np.array([10, 10, 20, 20, 20, 30, 30, 30, 40, 50.0]), np.array([10, 20, 30, 40, 40, 50.0])
    )
    assert (found["value"], found["ci_low"], found["ci_high"]) == pytest.approx(
        (-0.25, -0.7265846, 0.3890062), abs=1e-7
    )


def test_three_runs_above_three_are_not_certain():
    found = comparisons.two_samples(np.array([5.0, 6, 7]), np.array([1.0, 2, 3]))
    assert found["value"] == found["ci_high"] == 1
    assert found["ci_low"] == pytest.approx((3 - 1.96**2) / (3 + 1.96**2), abs=1e-4)
    assert found["p"] == pytest.approx(0.1)
    one = comparisons.one_sample(np.array([-1.0, -2, -3]))
    assert (one["value"], one["p"]) == (-1, pytest.approx(0.25))
    assert comparisons.two_samples(np.array([1.0]), np.array([2.0, 3]))["ci_low"] is None
    assert comparisons.one_sample(np.zeros(3))["ci_low"] is None


def test_deltas_of_cells_are_means_over_base_models(study):
    arms, cells, values = study
    rows = comparisons.cliffs_delta(influence.paired(values, arms), cells, **LABELS)
    own = rows[rows["contrast"].eq(comparisons.DELTA) & rows["against"].eq("ia3")]
    own = own[own["group"].eq(terms.AS_CONFIGURED)].set_index(["method", "base_model"])["value"]
    assert own["lora", "all"] == pytest.approx(
        (own["lora", "mini-llama"] + own["lora", "mini-mistral"]) / 2
    )
    assert rows["value"].between(-1, 1).all()


def test_where_no_prompt_of_a_kind_was_asked_nothing_is_estimated(study):
    """A small n can leave a benchmark without prompts of a kind, so that no run has a score."""
    arms, cells, values = study
    found = outcomes.rate_estimates(values.iloc[:0], arms, cells, **LABELS)
    assert found["value"].isna().all()
    assert comparisons.cliffs_delta(influence.paired(values.iloc[:0], arms), cells, **LABELS).empty


def test_delta_interval_covers_the_delta_of_normal_runs():
    rng, true, hits = np.random.default_rng(8), 2 * ndtr(1 / np.sqrt(2)) - 1, 0
    for _ in range(400):
        found = comparisons.two_samples(rng.normal(1, 1, 8), rng.normal(0, 1, 8))
        hits += found["ci_low"] <= true <= found["ci_high"]
    assert 0.9 <= hits / 400 <= 0.99


@pytest.mark.slow
def test_everything_is_a_table_of_estimates(study):
    arms, cells, values = study
    scores = influence.paired(values, arms)
    parts = [
        comparisons.between(scores, cells, **LABELS),
        comparisons.interactions(scores, cells, **LABELS),
        comparisons.settings(scores, arms, **LABELS),
    ]
    parts += [
        comparisons.odds_ratios(values, arms, cells, **LABELS),
        comparisons.cliffs_delta(scores, cells, **LABELS),
    ]
    assert len(ESTIMATES.concat(parts)) == sum(map(len, parts))


def test_a_pair_of_methods_has_one_direction_whatever_the_order_of_the_study_file():
    """Figures and models look a pair up in the workbook's order; a pair that stood the other way
    round would be an empty row.
    """
    verdicts = draw(5)
    methods = ["ln_tuning", "ln_tuning", "prompt_tuning", "prompt_tuning", "lora", "lora"]
    values, arms, cells = made(verdicts[:7], methods, ["a"] * 6)
    change = influence.paired(values, arms)
    found = {
        (row.method, row.contrast, row.against)
        for row in comparisons.between(change, cells, **LABELS).itertuples()
    }
    other = [("lora", "prompt_tuning"), ("lora", "ln_tuning"), ("prompt_tuning", "ln_tuning")]
    assert found == {(method, comparisons.DIFFERENCE, name) for method, name in other}
    deltas = comparisons.cliffs_delta(change, cells, **LABELS)
    assert {(row.method, row.contrast, row.against) for row in deltas.itertuples()} >= {
        (method, comparisons.DELTA, name) for method, name in other
    }
