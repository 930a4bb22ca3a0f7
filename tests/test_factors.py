"""Contrasts of matched cells and shares of the variance against slow obvious versions, statsmodels,
scipy, known truth and the original study's numbers.
"""

from itertools import combinations, permutations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from driftbook.analyses import factors, variance_shares
from driftbook.study.tables import ESTIMATES

LABELS = {"study": "s", "notebook": "n", "outcome": "o", "benchmark": "b", "judge": "j"}


def grid(
    bases="ab",
    methods=("lora", "p_tuning"),
    rates=(1e-3, 5e-3),
    objectives=("sft", "dpo"),
    repetitions=3,
) -> pd.DataFrame:
    rows = list(product(bases, methods, objectives, rates, range(1, repetitions + 1)))
    frame = pd.DataFrame(
        rows, columns=["base_model", "method", "objective", "learning_rate", "repetition"]
    )
    return frame.assign(
        run_id=[f"r{i}" for i in range(len(frame))], epochs=3, dataset="d", init=None
    )


def one_at_a_time() -> pd.DataFrame:
    """A grid in which settings differ from a first one in one factor or more, unequally repeated,
    with a method that lacks a cell.
    """
    cells = [
        ("sft", "chat", 2e-5, 1),
        ("sft", "feedback", 2e-5, 1),
        ("sft", "feedback", 2e-5, 5),
        ("sft", "feedback", 1e-3, 5),
        ("dpo", "feedback", 1e-3, 5),
    ]
    rows = [
        (base, method, *cell, repetition)
        for base, method, cell in product("ab", ("lora", "ia3"), cells)
        for repetition in range(1, 3 + (cell[3] == 5))
        if not (base == "b" and cell[0] == "dpo")
    ]
    frame = pd.DataFrame(
        rows,
        columns=[
            "base_model",
            "method",
            "objective",
            "dataset",
            "learning_rate",
            "epochs",
            "repetition",
        ],
    )
    return frame.assign(run_id=[f"r{i}" for i in range(len(frame))])


def drawn(frame: pd.DataFrame, mean, sd, seed: int = 0) -> pd.DataFrame:
    return frame.assign(value=mean + sd * np.random.default_rng(seed).normal(size=len(frame)))


def largest(runs: pd.DataFrame, grain: str = factors.CELL, **more) -> pd.DataFrame:
    return factors.largest_contrasts(factors.matched_contrasts(runs, grain, **more), **LABELS)


def both(runs: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(
        [largest(runs, grain) for grain in (factors.CELL, factors.MEAN)], ignore_index=True
    )


def row(estimates: pd.DataFrame, contrast: str, method: str, factor: str) -> pd.Series:
    [found] = [
        one
        for _, one in estimates[
            estimates["contrast"].eq(contrast)
            & estimates["method"].eq(method)
            & estimates["member"].eq(factor)
        ].iterrows()
    ]
    return found


# ---- contrasts
def test_contrasts_are_all_pairs_of_cells_that_differ_in_one_thing():
    runs = drawn(one_at_a_time(), 0, 1)
    names = ["base_model", "method", *(name for name in factors.SETTINGS if name != "init")]
    means = runs.groupby(names)["value"].mean()
    expected = []
    for (one, first), (two, second) in combinations(means.items(), 2):
        different = [name for name, a, b in zip(names, one, two, strict=True) if a != b]
        if len(different) == 1 and different != ["base_model"]:
            expected.append((factors.FACTORS.get(different[0], different[0]), abs(second - first)))
    found = factors.matched_contrasts(runs, n_draws=200)
    found = found[found["factor"].ne("repetition")]
    assert sorted(zip(found["factor"], found["value"].abs().round(9), strict=True)) == sorted(
        (name, round(value, 9)) for name, value in expected
    )
    assert {"learning rate", "objective", "epochs", "dataset", "method"} == set(found["factor"])


def test_the_later_level_is_compared_with_the_earlier():
    runs = grid("a", ("lora",), objectives=("sft",)).assign(
        value=lambda rows: 1000 * rows["learning_rate"]
    )
    rate = factors.matched_contrasts(runs).query("factor == 'learning rate'").iloc[0]
    assert (rate["first"], rate["second"], rate["value"]) == (
        "rate 0.001",
        "rate 0.005",
        pytest.approx(4.0),
    )


def test_variance_is_each_methods_own_and_df_is_welchs():
    runs = drawn(
        grid("a", rates=(1e-3,), objectives=("sft",), repetitions=5), 0, np.repeat([1.0, 9.0], 5)
    )
    found = factors.matched_contrasts(runs).query("factor == 'method'").iloc[0]
    a, b = (own["value"] for _, own in runs.groupby("method"))
    test = scipy_stats.ttest_ind(b, a, equal_var=False)
    assert (found["value"], found["df"]) == (
        pytest.approx(b.mean() - a.mean()),
        pytest.approx(test.df),
    )
    assert found["value"] / found["se"] == pytest.approx(test.statistic)
    assert factors.run_variance(runs)["variance"].tolist() == pytest.approx([a.var(), b.var()])


def test_the_band_is_tukeys_where_his_applies():
    runs = drawn(
        grid("a", ("lora",), rates=(1e-4, 1e-3, 1e-2, 1e-1), objectives=("sft",), repetitions=4),
        0,
        2.0,
    )
    runs["repetition"] = 1  # no contrast of repetitions beside those of rates
    found = factors.matched_contrasts(runs, n_draws=40_000)
    tukey = scipy_stats.tukey_hsd(
        *(own["value"] for _, own in runs.groupby("learning_rate"))
    ).confidence_interval()
    half = (tukey.high - tukey.low)[np.triu_indices(4, 1)] / 2
    assert ((found["ci_high"] - found["ci_low"]) / 2).to_numpy() == pytest.approx(half, rel=0.02)


@pytest.mark.slow
def test_the_largest_of_many_has_an_interval_that_holds_and_the_naive_one_does_not():
    runs, sets, hits, naive, below = grid(), 60, 0, 0, 0
    effect = np.where(runs["method"].eq("lora") & runs["learning_rate"].gt(2e-3), 3.0, 0.0)
    sd = np.where(runs["method"].eq("lora"), 1.0, 6.0)
    for seed in range(sets):
        found = factors.matched_contrasts(drawn(runs, effect, sd, seed), n_draws=200)
        table = factors.largest_contrasts(found, **LABELS)
        lora, other = (
            row(table, factors.WITHIN, method, "learning rate") for method in ("lora", "p_tuning")
        )
        hits += lora["ci_low"] <= 3 <= lora["ci_high"] and other["ci_low"] <= 0 <= other["ci_high"]
        top = found[found["factor"].eq("learning rate") & found["method"].eq("p_tuning")]
        naive += (top["value"].abs() > scipy_stats.t.ppf(0.975, top["df"]) * top["se"]).any()
        below += other["ci_low"] > 0
    assert hits / sets >= 0.93
    assert naive / sets > 0.12 > 2 * below / sets


def test_repetitions_are_compared_over_settings():
    runs = grid().assign(
        value=lambda rows: rows["repetition"].eq(3) * 5.0 + np.arange(len(rows)) % 2 * 0.1
    )
    found = factors.matched_contrasts(runs).query("factor == 'repetition'")
    assert len(found) == 2 * 2 * 3  # base models, methods, pairs
    assert found["value"].abs().max() == pytest.approx(5, abs=0.2)
    assert found["setting"].eq("mean of 4 matched pairs").all()


def test_means_over_matched_cells_let_opposite_effects_cancel():
    runs = drawn(grid(), 0, 0.5)
    runs["value"] += np.where(
        runs["learning_rate"].gt(2e-3), np.where(runs["base_model"].eq("a"), 8, -8), 0
    )
    assert row(largest(runs), factors.WITHIN, "lora", "learning rate")["value"] > 6
    mean = row(
        largest(runs, factors.MEAN), f"{factors.WITHIN}, {factors.MEAN}", "lora", "learning rate"
    )
    assert mean["value"] < 2
    assert "mean of 4 matched pairs" in mean["how"]


# ---- the word
@pytest.mark.parametrize(
    ("rate", "method", "expected"),
    [(1, 20, factors.SECONDARY), (20, 1, factors.NOT_SECONDARY), (5, 5, factors.CANNOT_TELL)],
)
def test_planted_effects_get_their_word(rate, method, expected):
    runs = grid()  # both methods move with the rate, so that they differ by `method` at each
    table = both(
        drawn(
            runs,
            rate * runs["learning_rate"].gt(2e-3) + method * runs["method"].eq("p_tuning"),
            0.6,
        )
    )
    for grain in (factors.CELL, factors.MEAN, None):
        assert factors.verdicts(table, grain).loc["learning rate"].eq(expected).all()


def test_a_word_needs_means_and_single_cells_to_agree():
    runs = grid()
    opposite = 20 * runs["learning_rate"].gt(2e-3) * runs["base_model"].map(
        {"a": 1, "b": -1}
    ) + 10 * runs["method"].eq("p_tuning")
    table = both(drawn(runs, opposite, 0.6))
    assert (
        factors.verdicts(table, factors.MEAN).loc["learning rate"].eq(factors.SECONDARY).all()
    )  # the base models' opposite effects cancel
    assert (
        factors.verdicts(table, factors.CELL).loc["learning rate"].eq(factors.NOT_SECONDARY).all()
    )
    assert factors.verdicts(table).loc["learning rate"].eq(factors.CANNOT_TELL).all()
    assert factors.verdicts(
        largest(runs.assign(value=opposite + 0.0))
    ).empty  # one grain alone has no word


@pytest.mark.slow
def test_bands_of_means_hold_where_cells_differ_in_variance():
    runs = grid("abcd")
    sd, hits = np.where(runs["learning_rate"].gt(2e-3) & runs["objective"].eq("dpo"), 10.0, 1.0), 0
    for seed in range(40):
        found = factors.matched_contrasts(drawn(runs, 0, sd, seed), factors.MEAN, n_draws=400)
        hits += (found["ci_low"].le(0) & found["ci_high"].ge(0)).all()
    assert hits / 40 >= 0.93


def test_estimates_are_declared_ordered_and_say_their_population():
    table = largest(drawn(one_at_a_time(), 0, 1))
    assert ESTIMATES.check(table).equals(table)
    known = table.dropna(subset=["ci_low", "ci_high"])
    assert len(known)
    assert (known["ci_low"] <= known["value"]).all()
    assert (known["value"] <= known["ci_high"]).all()
    assert table["population"].eq(factors.POPULATION).all()


def test_one_seed_gives_numbers_without_intervals_and_cannot_tell():
    runs = drawn(grid(repetitions=1), 0, 1)
    table = both(runs)
    assert table.loc[table["contrast"].eq(factors.WITHIN), "value"].notna().all()
    assert table[["se", "ci_low", "ci_high"]].isna().all().all()
    assert (factors.verdicts(table) == factors.CANNOT_TELL).all().all()
    assert "no repetition" in row(table, factors.WITHIN, "lora", "objective")["how"]
    shares = variance_shares.variance_shares(runs, **LABELS)
    assert shares["value"].isna().all()
    assert shares["how"].str.contains("no cell of lora, p_tuning was repeated").all()


def test_a_method_without_repetitions_leaves_the_others_their_intervals():
    runs = drawn(grid(), 0, 1)
    table = largest(runs[runs["method"].ne("lora") | runs["repetition"].eq(1)])
    assert pd.isna(row(table, factors.WITHIN, "lora", "objective")["ci_high"])
    assert pd.notna(row(table, factors.WITHIN, "p_tuning", "objective")["ci_high"])


def test_a_factor_that_a_method_does_not_have_is_said_to_be_missing():
    runs = drawn(grid(), 0, 1)
    runs["init"] = (
        runs["base_model"].map({"a": "text", "b": "random"}).where(runs["method"].eq("p_tuning"))
    )
    extra = runs[runs["init"].notna()].assign(
        run_id=lambda rows: rows["run_id"] + "x", init="other"
    )
    table = largest(pd.concat([runs, extra], ignore_index=True))
    lora = row(table, factors.WITHIN, "lora", "init")
    assert pd.isna(lora["value"])
    assert "no two cells of lora differ in init alone" in lora["how"]
    assert row(table, factors.WITHIN, "p_tuning", "init")["value"] > 0


def test_factors_that_change_only_together_have_one_name():
    runs = drawn(grid(), 0, 1)
    runs["dataset"] = runs["objective"] + ".json"
    assert set(factors.matched_contrasts(runs, n_draws=100)["factor"]) == {
        "learning rate",
        "objective and dataset",
        "repetition",
        "method",
    }
    assert variance_shares.variance_shares(runs, 10, **LABELS)["member"].tolist() == [
        "base model",
        "method",
        "learning rate",
        "objective and dataset",
        "seed",
    ]


def test_cells_that_were_run_on_some_base_models_only_are_named():
    found = factors.never_run(drawn(one_at_a_time(), 0, 1))
    assert found["method"].tolist() == ["lora", "ia3"]
    assert found["never_run_on"].eq("b").all()
    assert found["setting"].str.contains("dpo").all()


def test_bad_runs_are_refused_in_one_sentence():
    runs = drawn(grid(), 0, 1)
    for bad, words in (
        (pd.concat([runs, runs.head(2)]), "2 runs stand twice, first r0"),
        (runs.drop(columns="value"), r"without the columns \['value'\]"),
        (runs.assign(value=None), "no run has a value"),
    ):
        with pytest.raises(ValueError, match=words):
            factors.matched_contrasts(bad)
    arms = runs.assign(
        arm="trained", mitigation=None, settings=["one"] + ["another"] * (len(runs) - 1)
    )
    with pytest.raises(ValueError, match="1 cells hold runs with different other settings"):
        factors.factor_runs(arms, runs.set_index("run_id")["value"])


def test_a_single_run_has_nothing_to_be_compared_with():
    runs = drawn(grid(), 0, 1).head(1)
    [only] = [one for _, one in largest(runs).iterrows()]
    assert pd.isna(only["value"])
    assert "no two methods were run at equal settings" in only["how"]
    assert variance_shares.variance_shares(runs, 10, **LABELS)["value"].isna().all()


def test_runs_without_a_value_are_left_out():
    runs = drawn(grid(), 0, 1)
    poor = pd.concat(
        [runs, runs.assign(run_id=runs["run_id"] + "x", value=None)], ignore_index=True
    )
    pd.testing.assert_frame_equal(largest(poor), largest(runs))


# ---- shares
def slow_shares(runs: pd.DataFrame, names: list[str]) -> pd.Series:
    """Shares from statsmodels' sequential sums of squares, averaged over all orders of the factors;
    a factor enters with its interactions with those before.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    full = anova_lm(ols(f"value ~ {' * '.join(f'C({name})' for name in names)}", runs).fit(), typ=1)
    noise = full.loc["Residual", "mean_sq"]
    totals = dict.fromkeys(names, 0.0)
    orders = list(permutations(names))
    for order in orders:
        for i, name in enumerate(order):
            terms = [
                ":".join(f"C({one})" for one in part)
                for k in range(i + 1)
                for part in combinations(order[:i], k)
            ]
            terms = [f"{term}:C({name})" if term else f"C({name})" for term in terms]
            table = anova_lm(
                ols(f"value ~ {' * '.join(f'C({one})' for one in order[: i + 1])}", runs).fit(),
                typ=1,
            )
            rows = [
                term
                for term in table.index
                if set(term.split(":")) in [set(wanted.split(":")) for wanted in terms]
            ]
            totals[name] += (
                table.loc[rows, "sum_sq"].sum() - noise * table.loc[rows, "df"].sum()
            ) / len(orders)
    found = pd.Series(totals)
    return 100 * found / full["sum_sq"].sum()


@pytest.mark.slow
def test_balanced_shares_are_statsmodels_averaged_over_all_orders():
    runs = grid("abc")
    mean = (
        runs["base_model"].map({"a": 0, "b": 3, "c": 5})
        + runs["learning_rate"].gt(2e-3) * runs["method"].map({"lora": 4, "p_tuning": -4})
        + runs["objective"].eq("dpo") * 1.5
    )
    runs = drawn(runs, mean, 1.5)
    expected = slow_shares(runs, ["base_model", "method", "learning_rate", "objective"])
    found = variance_shares.variance_shares(runs, 10, **LABELS)["value"].to_numpy(float)
    assert found[:-1] == pytest.approx(expected.to_numpy(), abs=1e-8)
    assert found.sum() == pytest.approx(100)


def test_shares_of_any_grid_are_adjusted_sums_of_squares_over_all_orders():
    from statsmodels.api import OLS

    runs = drawn(one_at_a_time(), 0, 2)
    runs["value"] += runs["epochs"] + runs["base_model"].eq("a") * 3
    names = ["base_model", "method", "learning_rate", "objective", "epochs", "dataset"]
    cell = runs.groupby(names)["value"]
    variance = cell.transform("var")

    def worth(inside) -> float:  # by statsmodels' own fit of a mean for each combination of levels
        fit = OLS(
            runs["value"],
            (
                pd.get_dummies(runs[list(inside)].astype(str).agg(" ".join, axis=1), dtype=float)
                if inside
                else np.ones(len(runs))
            ),
        ).fit()
        hat = fit.get_influence().hat_matrix_diag
        return -fit.ssr - hat @ variance

    expected = dict.fromkeys(names, 0.0)
    known = {
        inside: worth(inside) for k in range(len(names) + 1) for inside in combinations(names, k)
    }
    for order in permutations(names):
        for i, name in enumerate(order):
            before, after = (
                tuple(one for one in names if one in part) for part in (order[:i], order[: i + 1])
            )
            expected[name] += (known[after] - known[before]) / 720
    total = ((runs["value"] - runs["value"].mean()) ** 2).sum()
    found = variance_shares.variance_shares(runs, 10, **LABELS)["value"].to_numpy(float)
    assert found[:-1] == pytest.approx([100 * expected[name] / total for name in names])


def test_shares_do_not_depend_on_the_order_of_rows_or_the_names_of_levels():
    runs = drawn(one_at_a_time(), np.arange(len(one_at_a_time())) % 5, 1)
    shuffled = runs.sample(frac=1, random_state=1).assign(
        base_model=lambda rows: rows["base_model"].map({"a": "z", "b": "y"})
    )
    one, two = (
        variance_shares.variance_shares(frame, 10, **LABELS).set_index("member")["value"]
        for frame in (runs, shuffled)
    )
    assert two.reindex(one.index).tolist() == pytest.approx(one.tolist())


@pytest.mark.slow
def test_noise_has_no_share_but_the_seeds():
    runs, sd = grid(), np.where(grid()["method"].eq("lora"), 1.0, 8.0)
    found = np.array(
        [
            variance_shares.variance_shares(drawn(runs, 0, sd, seed), 2, **LABELS)[
                "value"
            ].to_numpy(float)
            for seed in range(25)
        ]
    )
    assert np.abs(found[:, :-1].mean(0)).max() < 3
    assert found[:, -1].mean() == pytest.approx(100, abs=6)


@pytest.mark.slow
def test_intervals_of_shares_cover_the_truth():
    runs, hits = grid("abcd"), []
    mean = (
        runs["base_model"].map(dict(zip("abcd", (-4, 0, 3, 6), strict=True)))
        + runs["method"].eq("p_tuning") * 7
    ).to_numpy(float)
    sd = np.where(runs["method"].eq("lora"), 1.6, 8.0)
    noise = (sd**2).sum() - (
        sd**2
    ).mean()  # what is expected of the seeds, and of two balanced factors without interaction
    parts = [
        ((runs.assign(mean=mean).groupby(name)["mean"].transform("mean") - mean.mean()) ** 2).sum()
        for name in ("base_model", "method")
    ]
    truth = 100 * np.array([*parts, 0, 0, noise]) / (sum(parts) + noise)
    for seed in range(25):
        found = variance_shares.variance_shares(drawn(runs, mean, sd, seed), 200, seed, **LABELS)
        hits.append(
            (found["ci_low"].to_numpy(float) <= truth) & (truth <= found["ci_high"].to_numpy(float))
        )
    assert np.mean(hits, axis=0).min() > 0.88


def test_runs_that_do_not_differ_have_no_shares():
    found = variance_shares.variance_shares(grid().assign(value=1.0), 10, **LABELS)
    assert found["value"].isna().all()
    assert found["how"].str.contains("no variance to share").all()


def test_redrawn_runs_keep_the_variance_of_their_cell():
    values = np.array([[1.0], [4.0], [6.0], [7.0], [20.0]])
    again = variance_shares.redrawn(
        values, np.array([0, 0, 0, 1, 2]), np.array([0, 0, 0, 0, 1]), 4000, np.random.default_rng(0)
    )[..., 0]
    assert again[:, :3].var() == pytest.approx(values[:3].var(ddof=1), rel=0.05)
    assert again[:, 3].std() == pytest.approx(
        values[:3].std(ddof=1), rel=0.05
    )  # alone in its cell: as its pool's repeated cells
    assert (again[:, 4] == 20).all()  # nothing in its pool was repeated


# ---- the original study
def test_the_original_studys_numbers(shared):
    runs = pd.read_csv(shared / "original_study" / "runs.csv")
    runs = runs.rename(
        columns={"learning_rate_true": "learning_rate", "round": "repetition", "safe_pct": "value"}
    ).assign(run_id=runs["run"].astype(str))
    rate = (
        factors.matched_contrasts(runs, factors.MEAN, n_draws=200)
        .query("factor == 'learning rate'")
        .set_index("method")["value"]
    )
    assert rate.to_dict() == pytest.approx(
        {"lora": -4.5, "prompt_tuning": 6.5, "p_tuning": -5.3, "ia3": 2.9}, abs=0.06
    )  # facts: 1e-3 instead of 2e-5
    sd = np.sqrt(
        factors.run_variance(runs)["variance"]
    )  # pooled by df; the facts' average cells alike
    assert sd.to_dict() == pytest.approx(
        {"lora": 1.6, "ia3": 1.7, "prompt_tuning": 7.5, "p_tuning": 13.5}, rel=0.12
    )
    shares = variance_shares.variance_shares(runs, 200, **LABELS)
    assert shares["value"].sum() == pytest.approx(100)
    words = factors.verdicts(both(runs))
    assert words.loc["learning rate", ["all", "lora", "ia3"]].tolist() == [
        factors.CANNOT_TELL,
        factors.SECONDARY,
        factors.SECONDARY,
    ]
