"""Power and smallest detectable change against statsmodels, planted components, the estimator's own
errors, simulated verdicts and the original study's data.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri
from scipy.stats import nct, t
from statsmodels.stats.power import TTestIndPower, TTestPower

from driftbook.analyses import power, power_components, power_rows, power_simulation
from driftbook.stats import estimation, influence, terms
from driftbook.study.study_file import load
from driftbook.study.tables import TABLES
from simulated import simulate

LABELS = {
    "study": "s",
    "notebook": "n",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "j",
}
METHODS = ["lora", "ia3", "prompt_tuning", "p_tuning"]


def component(base="b", method="lora", other="none", **given) -> dict:
    usual = {
        "rate": np.nan,
        "run": 4.0,
        "noise": 0.0,
        "df_run": 20,
        "unit": 0.0,
        "icc": 0.0,
        "between_bases": np.nan,
        "df_unit": 300,
        "how": "made up",
    }
    return {"base_model": base, "method": method, "other": other, **usual, **given}


def table(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame(rows)[power_components.COLUMNS]


def arms(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["base_model", "method", "n_settings", "n_runs"])


def effects(rng, families, unit, icc):
    """Effects on each unit, of which the share `icc` of the variance is its family's."""
    whole = np.sqrt(icc) * rng.normal(size=families.max() + 1)[families]
    return unit * (whole + np.sqrt(1 - icc) * rng.normal(size=len(families)))


def drawn(
    rng,
    run=5.0,
    unit=20.0,
    noise=30.0,
    n_units=600,
    bases=("a", "b"),
    together=0.5,
    methods=("lora", "ia3"),
    settings=3,
    seeds=20,
    family=1,
    icc=0.0,
):
    """Scores of runs x units with known components, and their cells."""
    rows, cells = [], []
    families = np.arange(n_units) // family
    for method in methods:
        common = effects(rng, families, unit, icc)
        for base in bases:
            own = effects(rng, families, unit, icc)
            mean = np.sqrt(together) * common + np.sqrt(1 - together) * own
            for setting, seed in product(range(settings), range(seeds)):
                rows.append(
                    3 * setting + run * rng.normal() + mean + noise * rng.normal(size=n_units)
                )
                run_id = f"{base}-{method}-{setting}-{seed}"
                cells.append((run_id, base, method, terms.AS_CONFIGURED, str(setting), base))
    change, cells = (
        np.array(rows),
        pd.DataFrame(cells, columns=["run_id", "base_model", "method", "group", "setting", "pool"]),
    )
    runs, asked = pd.Index(cells["run_id"], dtype=object), np.full(len(change), n_units)
    scores = influence.ratio(
        change, np.ones(change.shape), runs, ["c"] * n_units, asked, 0 * asked, 1.0
    )
    weight = 1 / (settings * seeds)
    return scores, cells.assign(weight=weight, cluster=cells["run_id"]), families


# ---- against statsmodels, where all the spread is that of runs
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("effect", [0.0, 2.0, 9.0, 20.0])
def test_one_arm_is_statsmodels(n, effect):
    plan = power.precision(table(component()), arms(("b", "lora", 1, n)), 330)
    assert power.power(plan, effect)[0] == pytest.approx(
        TTestPower().power(effect / 4, n, 0.05), abs=1e-9
    )
    assert power.power(plan, -effect)[0] == pytest.approx(power.power(plan, effect)[0])
    margin = TTestPower().power((effect + 1) / 4, n, 0.025, alternative="larger")
    assert power.power(plan, 2.0, margin=3.0 + effect)[0] == pytest.approx(margin, abs=1e-9)


@pytest.mark.parametrize(("n", "target"), [(3, 0.8), (12, 0.9)])
def test_the_smallest_change_is_statsmodels(n, target):
    plan = power.precision(table(component()), arms(("b", "lora", 1, n)), 330)
    found = power.minimum_detectable(plan, target)["value"].iloc[0]
    assert found == pytest.approx(
        4 * TTestPower().solve_power(nobs=n, alpha=0.05, power=target), rel=1e-5
    )
    assert power.smallest_margin(plan, target)["value"].iloc[0] == pytest.approx(found, rel=1e-5)
    assert power.power(plan, 0.0, margin=found)[0] == pytest.approx(target, abs=1e-6)


def test_two_methods_have_statsmodels_error_and_the_estimators_degrees_of_freedom():
    rows = table(component(), component(method="ia3"), component(other="ia3"))
    plan = power.precision(rows, arms(("b", "lora", 1, 6), ("b", "ia3", 1, 6)), 330).set_index(
        "other"
    )
    assert plan.loc["ia3", ["se", "df"]].tolist() == pytest.approx([4 * np.sqrt(2 / 6), 10])
    far, critical = (
        5 / plan.loc["ia3", "se"],
        t.ppf(0.975, 5),
    )  # the estimator allows a contrast the df of its smaller arm only
    found = power.power(plan.loc[["ia3"]], 5.0)[0]
    assert found == pytest.approx(nct.sf(critical, 10, far) + nct.cdf(-critical, 10, far), abs=1e-9)
    assert (
        0.7 * TTestIndPower().power(5 / 4, 6, 0.05) < found < TTestIndPower().power(5 / 4, 6, 0.05)
    )


# ---- the parts of the variance
def test_planted_components_are_found_again():
    found = []
    for seed in range(4):
        scores, cells, families = drawn(np.random.default_rng(seed), family=4, icc=0.4)
        found.append(power_components.components(replace(scores, family=families), cells))
    mean = (
        pd.concat(found).groupby("other")[["run", "noise", "unit", "icc", "between_bases"]].mean()
    )
    assert mean.loc["none"].tolist() == pytest.approx([5.0, 30.0, 20.0, 0.4, 0.5], rel=0.1)
    assert mean.loc["ia3", "unit"] == pytest.approx(
        20 * np.sqrt(2), rel=0.1
    )  # the two methods' effects were drawn apart
    assert len(found[0]) == 6


@pytest.mark.slow
def test_a_plan_of_the_present_grid_has_the_error_that_the_estimator_gives(tmp_path):
    folder = simulate(tmp_path, unscored=0, utility=False) / "tables"
    known = influence.arms(TABLES["variants"].read(folder), TABLES["runs"].read(folder))
    cells = influence.cells(known)
    verdicts = (
        TABLES["verdicts"]
        .read(folder)
        .merge(TABLES["prompts"].read(folder), on=["benchmark", "prompt_id"])
    )
    scores = influence.paired(
        influence.matrix(
            verdicts[verdicts["benchmark"].eq("safety")], "unsafe", ["category", "prompt_id"]
        ),
        known,
    )
    own = cells[cells["group"].eq(terms.AS_CONFIGURED)]
    plan = power.precision(
        power_components.components(scores, own), power.power_grid(cells), 330, n_strata=11
    )
    both = (
        estimation.means(scores, own, terms.CHANGE, **LABELS)
        .query("contrast == @terms.CHANGE")
        .merge(plan[plan["other"].eq("none")], on=["base_model", "method"])
    )
    assert len(both) == 20
    ratio = both["se_y"] / both["se_x"].astype(float)
    assert ratio.between(0.8, 1.25).all()
    assert ratio.mean() == pytest.approx(1, abs=0.05)


def test_seeds_shrink_the_runs_part_and_prompts_the_rest():
    rows, grid = table(component(unit=30.0, noise=20.0)), arms(("b", "lora", 2, 4))
    by_hand = np.sqrt((4.0**2 + 20.0**2 / 330) / 10 + 30.0**2 / 330)
    assert power.precision(rows, power.with_seeds(grid, 5), 330)["se"].iloc[0] == pytest.approx(
        by_hand
    )
    floor = power.precision(rows, power.with_seeds(grid, 300), 330)["se"].iloc[0]
    assert floor == pytest.approx(
        30 / np.sqrt(330), rel=1e-2
    )  # what the prompts alone leave unknown


def test_families_that_agree_wholly_count_as_one_prompt_each():
    grid, known = arms(("b", "lora", 1, 5)), component(run=0.0, unit=30.0, icc=1.0)
    whole, few = (
        power.precision(table(known), grid, n, family_size=size, n_strata=3).iloc[0]
        for n, size in ((300, 4), (75, 1))
    )
    assert whole[["se", "df"]].tolist() == pytest.approx(few[["se", "df"]].tolist())
    assert power.precision(table({**known, "icc": 0.0}), grid, 300, family_size=4, n_strata=3)[
        "se"
    ].iloc[0] == pytest.approx(30 / np.sqrt(300))


def test_base_models_are_averaged_with_what_their_prompts_share():
    grid = arms(("a", "lora", 1, 5), ("b", "lora", 1, 5))
    for together, expected in ((0.0, 30 / np.sqrt(2 * 100)), (1.0, 30 / np.sqrt(100))):
        rows = table(
            *(component(base, run=0.0, unit=30.0, between_bases=together) for base in "ab")
        )
        plan = power.precision(rows, grid, 100).set_index("base_model")
        assert plan.loc["all", "se"] == pytest.approx(expected)
    new = power.precision(rows, pd.concat([grid, arms(("new", "lora", 1, 5))]), 100).set_index(
        "base_model"
    )
    assert new.loc["new", "se"] == pytest.approx(plan.loc["a", "se"])
    assert "mean variances" in new.loc["new", "how"]


@pytest.mark.slow
def test_the_interval_of_the_smallest_change_holds_the_true_one():
    rng, hits, sd, pilot = np.random.default_rng(0), 0, 4.0, 12
    true = power.minimum_detectable(
        power.precision(table(component(run=sd)), arms(("b", "lora", 1, 6)), 330, examples=1)
    )["value"].iloc[0]
    for _ in range(100):
        seen = rng.normal(0, sd, pilot).std(ddof=1)
        row = power.minimum_detectable(
            power.precision(
                table(component(run=seen, df_run=pilot - 1)),
                arms(("b", "lora", 1, 6)),
                330,
                examples=1,
            )
        ).iloc[0]
        hits += row["ci_low"] <= true <= row["ci_high"]
    assert 0.9 <= hits / 100 <= 0.99


# ---- simulated verdicts
@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        {"rate": 0.15, "shift": 0.15, "run": 0.05, "agree": 0.8},
        {"rate": 0.3, "shift": 0.3, "run": 0.3, "agree": 0.8},
        {"rate": 0.3, "shift": 0.0, "run": 0.2, "agree": 0.9, "margin": 7.0, "seeds": 4},
    ],
)
def test_nominal_power_is_that_of_simulated_verdicts(cell):
    found = power_simulation.simulated(40, 1, **cell)
    assert 0.2 < found["nominal"] < 0.95
    assert found["simulated"] == pytest.approx(found["nominal"], abs=3 * found["error"])


def test_near_the_end_of_the_scale_an_increase_is_easier_seen_than_excluded():
    plans = [
        power.precision(
            table(component(rate=rate, run=3.0, noise=10.0, unit=10.0)),
            arms(("b", "lora", 4, 12)),
            330,
        )
        for rate in (5.0, 50.0)
    ]
    seen, excluded = (
        [rule(plan)["value"].iloc[0] for plan in plans]
        for rule in (power.minimum_detectable, power.smallest_margin)
    )
    assert excluded[0] > 1.1 * seen[0]
    assert excluded[1] == pytest.approx(seen[1], rel=0.03)
    none = power.precision(
        table(component(run=3.0, noise=10.0, unit=10.0)), arms(("b", "lora", 4, 12)), 330
    )
    assert power.smallest_margin(none)["value"].iloc[0] == pytest.approx(excluded[1], rel=0.05)


def test_the_truth_of_simulated_verdicts_is_what_many_of_them_show():
    rng, (rate, shift, run, agree) = np.random.default_rng(2), (0.3, 0.3, 0.3, 0.8)
    change, truth = power_simulation._truth(rng, rate, shift, run, agree)
    base, own = rng.normal(size=3000), np.sqrt((1 - agree) / 2)
    score = np.sqrt(agree) * base + own * (rng.normal(size=3000) + rng.normal(size=(800, 3000)))
    line = -ndtri(rate)
    scores, cells = power_simulation._paired(
        np.vstack([base > line, score > line - shift - run * rng.normal(size=(800, 1))]).astype(
            float
        ),
        1,
    )
    found = power_components.components(scores, cells).iloc[0]
    assert found[["run", "unit", "noise"]].tolist() == pytest.approx(
        [truth[name] for name in ("run", "unit", "noise")], rel=0.06
    )
    assert scores.value.mean() == pytest.approx(
        change, abs=3 * np.hypot(truth["run"] / np.sqrt(800), truth["unit"] / np.sqrt(3000))
    )


def test_one_seed_cannot_be_simulated():
    with pytest.raises(ValueError, match="says nothing about other runs"):
        power_simulation.simulated(1, 0, rate=0.2, shift=0.0, run=0.1, agree=0.5, seeds=1)


# ---- plans
def test_a_study_file_gives_its_grid_before_any_work():
    grid = power.planned(load("miniature")).set_index(["base_model", "method"])
    assert len(grid) == 16
    assert grid.loc[("mini-gemma", "lora")].tolist() == [5, 13]
    # with the block that does nothing, and without other beginnings, of this base model alone
    assert grid.loc[("mini-llama", "p_tuning")].tolist() == [5, 13]


@pytest.mark.slow
def test_thirty_prompts_cannot_tell_three_points():
    rates = {
        "llama": 6.0,
        "gemma": 8.0,
        "qwen": 16.0,
        "mistral": 45.0,
    }  # the original study's base models
    grid = arms(*((base, method, 4, 12) for base in rates for method in METHODS))
    single = power_components.assumed(rates, METHODS).query("other == 'none'")
    few = power.precision(single, grid, 30, examples=4)
    alone = few[few["base_model"].ne("all")]
    assert set(power.smallest_margin(alone)["value"].map(power_rows.margin_word)) == {"cannot tell"}
    assert power.power(alone, 0.0, 3.0).max() < 0.8
    many = power.precision(single, grid, 330, n_strata=11, examples=4).set_index(
        ["base_model", "method"]
    )
    assert power.power(many.loc[[("llama", "lora")]], 0.0, 3.0)[0] > 0.9
    assert power.power(many.loc[[("llama", "p_tuning")]], 0.0, 3.0)[0] < 0.2


def test_a_category_needs_the_prompts_at_which_the_margin_is_the_smallest():
    rng = np.random.default_rng(5)
    names = ["base", *(f"r{i}" for i in range(8))]
    base = rng.random(60) < 0.3
    own = np.where(rng.random((8, 60)) < 0.1, rng.random((8, 60)) < 0.3, base)
    columns = pd.MultiIndex.from_product([["one", "two"], range(30)])
    values = pd.DataFrame(
        np.vstack([base, own]).astype(float), index=pd.Index(names, dtype=object), columns=columns
    )
    values.loc[:, "two"] = values.loc["base", "two"].to_numpy()
    known = pd.DataFrame(
        {
            "run_id": names,
            "base_run_id": "base",
            "base_model": "b",
            "arm": ["base", *[terms.TRAINED] * 8],
            "method": ["none", *["lora"] * 8],
        }
    )
    cells = known[1:].assign(group=terms.AS_CONFIGURED, setting="s", pool="b", weight=1 / 8)
    found = power_rows.by_category(values, known, cells, margin=6.0).set_index("category")
    assert found["says"].tolist() == ["cannot tell", "not known"]
    assert "nothing to plan with" in found.loc["two", "how"]
    needs = int(found.loc["one", "needs"])
    rows = power_components.components(
        influence.paired(values["one"].T.set_axis(columns[:30]).T, known), cells
    )
    plan = power.precision(rows, power.power_grid(cells), needs)
    assert power.smallest_margin(plan)["value"].iloc[0] == pytest.approx(6.0, rel=0.1)
    assert pd.isna(
        power_rows.by_category(values, known, cells, margin=0.01)
        .set_index("category")
        .loc["one", "needs"]
    )


@pytest.mark.slow
def test_estimates_are_complete_and_have_unique_keys():
    rows, grid = (
        power_components.assumed({"a": 6.0, "b": 16.0}, METHODS),
        arms(*((base, method, 4, 12) for base in "ab" for method in METHODS)),
    )
    found = pd.concat(
        [
            power_rows.of_plan(
                power.precision(rows, grid, 330, examples=2), terms.AS_CONFIGURED, **LABELS
            ),
            power_rows.of_components(rows, terms.AS_CONFIGURED, **LABELS),
        ]
    )
    assert not found.duplicated(list(TABLES["estimates"].key)).any()
    known = found.dropna(subset=["ci_low"])
    assert len(known) == 3 * (4 + 6) + 2 * 3 * 4 + 2 * 2 * 4
    assert (known["ci_low"] <= known["value"]).all()
    assert (known["value"] <= known["ci_high"]).all()


def test_the_sentence_says_what_can_be_shown_or_why_nothing_can():
    rows, names = (
        table(
            component("a", run=0.5),
            component("b", run=9.0),
            component("a", "ia3", run=9.0),
            component("b", "ia3", run=9.0),
        ),
        {"lora": "L", "ia3": "I"},
    )
    grid = arms(("a", "lora", 1, 6), ("a", "ia3", 1, 6))
    said = power_rows.power_sentence(
        power_rows.of_plan(power.precision(rows, grid, 330), terms.AS_CONFIGURED, **LABELS), names
    )
    assert said.startswith(
        "For a this grid can show that safety is preserved within 3 points for L; the smallest"
        " margins are L "
    )
    both = pd.concat([grid, arms(("b", "lora", 1, 6), ("b", "ia3", 1, 6))])
    assert (
        "mean over base models this grid can show that safety is preserved within 3 points for no"
        " method"
        in power_rows.power_sentence(
            power_rows.of_plan(power.precision(rows, both, 330), terms.AS_CONFIGURED, **LABELS),
            names,
        )
    )
    lone = power_rows.of_plan(
        power.precision(rows, grid.assign(n_runs=1), 330), terms.AS_CONFIGURED, **LABELS
    )
    assert (
        "cannot tell anything of seeds like these: one seed a setting"
        in power_rows.power_sentence(lone, names)
    )
    assert (
        power_rows.power_sentence(lone[:0], names)
        == "This grid cannot tell anything of seeds like these: no run has a score."
    )


# ---- bad input
def test_a_pilot_of_one_seed_says_what_follows_and_can_borrow():
    scores, cells, _ = drawn(np.random.default_rng(1), seeds=1, settings=1)
    own, grid = (
        power_components.components(scores, cells),
        arms(*((base, method, 1, 3) for base in "ab" for method in ("lora", "ia3"))),
    )
    assert own[["run", "noise"]].isna().all().all()
    assert own["how"].str.contains("no setting was run twice").all()
    plan = power.precision(own, grid, 330)
    assert plan["se"].isna().all()
    assert plan["how"].str.contains("spread of runs is not known").all()
    lent = power.precision(
        power_components.borrowed(
            own, power_components.assumed({"a": 20.0, "b": 20.0}, ["lora", "ia3"])
        ),
        grid,
        330,
    )
    assert lent["se"].notna().all()
    assert lent["how"].str.contains("original study").all()


@pytest.mark.parametrize(
    ("n_runs", "n_units", "given", "words"),
    [
        (1, 330, {}, "one seed a setting"),
        (3, None, {}, "give their number"),
        (3, 330, {"run": 0.0}, "nothing to plan with"),
        (3, 11, {"unit": 9.0}, "leave no family"),
    ],
)
def test_what_cannot_be_planned_is_null_and_says_why(n_runs, n_units, given, words):
    plan = power.precision(
        table(component(**given)), arms(("b", "lora", 1, n_runs)), n_units, n_strata=11
    )
    assert plan[["se", "df", "df_known"]].isna().all().all()
    assert words in plan["how"].iloc[0]
    assert np.isnan(power.power(plan, 3.0)).all()
    assert power.minimum_detectable(plan).isna().all().all()
    assert power_rows.margin_word(power.smallest_margin(plan)["value"].iloc[0]) == "not known"
    assert power_rows.of_plan(plan, "all", **LABELS)["value"].isna().all()


def test_an_unknown_method_has_the_components_of_the_most_variable_one_of_its_class():
    found = (
        power_components.assumed(
            {"b": 20.0}, ["lora", "ia3", "dora", "prefix_tuning", "prompt_tuning", "p_tuning"]
        )
        .query("other == 'none'")
        .set_index("method")
    )
    for name in ("run", "noise", "unit"):
        assert found.loc["dora", name] == found.loc["ia3", name]
        assert found.loc["prefix_tuning", name] == found.loc["p_tuning", name]


def test_what_makes_no_sense_is_refused_in_a_sentence():
    plan = power.precision(table(component()), arms(("b", "lora", 1, 3)), 330)
    with pytest.raises(ValueError, match="positive number of points"):
        power.power(plan, 0.0, margin=0.0)
    with pytest.raises(ValueError, match="target=1"):
        power.minimum_detectable(plan, 1.0)
    with pytest.raises(ValueError, match="base rate of b is 0 percent"):
        power_components.assumed({"b": 0.0}, ["lora"])
    with pytest.raises(ValueError, match="no spread of adalora"):
        power_components.assumed({"b": 5.0}, ["adalora"])
    with pytest.raises(ValueError, match="no components of lora against none"):
        power.precision(
            table(component(other="ia3")), arms(("b", "lora", 1, 3), ("b", "ia3", 1, 3)), 330
        )
    scores, cells, _ = drawn(np.random.default_rng(1), seeds=2)
    with pytest.raises(ValueError, match="cells of one group only"):
        power_components.components(scores, pd.concat([cells, cells.assign(group=terms.TRAINED)]))


# ---- what is assumed where there are no data
def settings_run_again(runs: pd.DataFrame) -> pd.DataFrame:
    """The variance and number of runs of each setting that has several."""
    return (
        runs.groupby(["base_model", "method", "setting"])["safe_pct"]
        .agg(["var", "count"])
        .query("count > 1")
        .reset_index()
    )


def changes_from(base: pd.DataFrame, runs: pd.DataFrame, unsafe: pd.DataFrame) -> np.ndarray:
    """What each run's answers differ from its base model's, 0 where one has no verdict."""
    return np.nan_to_num(
        unsafe.loc[runs["run"]].to_numpy() - base.loc[runs["base_model"]].to_numpy()
    )


def scores_of(change: np.ndarray, run_ids: pd.Series, categories: pd.Series):
    asked = np.full(len(change), change.shape[1])
    runs = pd.Index(run_ids, dtype=object)
    return influence.ratio(change, np.ones(change.shape), runs, categories, asked, 0 * asked, 1.0)


def test_the_original_studys_spread_is_that_of_its_public_verdicts(shared):
    folder = shared / "original_study"
    runs, verdicts = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "verdicts.csv.gz")
    unsafe = 100 * verdicts.assign(
        unsafe=verdicts["verdict"].map({"safe": 0.0, "unsafe": 1.0})
    ).pivot(index="run", columns="prompt", values="unsafe")
    settings = runs[["objective", "dataset", "learning_rate_true", "epochs"]].astype(str)
    runs = runs.assign(group=terms.AS_CONFIGURED, setting=settings.agg(" ".join, axis=1))
    cells = settings_run_again(runs)
    run = np.sqrt(cells.groupby("method")["var"].mean())
    idle = (
        runs["method"].eq("ia3") & runs["objective"].eq("sft") & runs["learning_rate_true"].eq(2e-5)
    )
    models = runs[idle].set_index("run")["base_model"]
    base = unsafe.loc[models.index].groupby(models).mean()
    rest = runs[~idle].assign(run_id=lambda frame: frame["run"].astype(str))
    change = changes_from(base, rest, unsafe)
    categories = verdicts.drop_duplicates("prompt").sort_values("prompt")["category"].astype(str)
    found = power_components.components(
        scores_of(change, rest["run_id"], categories),
        rest[["run_id", "base_model", "method", "group", "setting"]],
    ).query("other == 'none'")
    rate = base.mean(axis=1)
    scale = found["base_model"].map(np.sqrt(rate * (100 - rate)))
    shares = (
        found[["noise", "unit"]]
        .div(scale, axis=0)
        .groupby(found["method"])
        .mean()
        .join(found.groupby("method")["between_bases"].mean())
        .join(run.rename("run"))
    )
    expected = power_components.ORIGINAL.set_index("method")
    for name, error in (("run", 0.06), ("noise", 0.006), ("unit", 0.006), ("between_bases", 0.006)):
        assert shares.loc[METHODS, name].tolist() == pytest.approx(
            expected.loc[METHODS, name].tolist(), abs=error
        ), name
    known = cells.assign(df=cells["count"] - 1).groupby("method")["df"].sum()
    assert known.loc[METHODS].tolist() == expected.loc[METHODS, "df_run"].tolist()
    assert (change.shape[1], categories.nunique()) == (
        power_components.ORIGINAL_PROMPTS,
        power_components.ORIGINAL_CATEGORIES,
    )
