"""Intervals, changes, mixed models and bias scores against known values, hand counts and slow
obvious versions.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint

from driftbook import stats
from driftbook.benchmarks import bbq_orders, bbq_scores
from driftbook.stats import estimation, influence, intervals, terms
from driftbook.study.tables import TABLES
from simulated import simulate

SHARED = Path(os.environ.get("DRIFTBOOK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
LABELS = {
    "study": "s",
    "notebook": "n",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "j",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return (
        simulate(
            tmp_path_factory.mktemp("stats"), bases=["mini-llama", "mini-mistral"], utility=False
        )
        / "tables"
    )


@pytest.fixture(scope="module")
def arms(folder) -> pd.DataFrame:
    return influence.arms(TABLES["variants"].read(folder), TABLES["runs"].read(folder))


@pytest.fixture(scope="module")
def values(folder) -> pd.DataFrame:
    verdicts = (
        TABLES["verdicts"]
        .read(folder)
        .merge(TABLES["prompts"].read(folder), on=["benchmark", "prompt_id"])
    )
    return influence.matrix(
        verdicts[verdicts["benchmark"].eq("safety")], "unsafe", ["category", "prompt_id"]
    )


def few(change: np.ndarray, strata=None, settings="a") -> tuple[influence.Scores, pd.DataFrame]:
    """Scores of runs x prompts of known changes, and one cell of all runs."""
    runs = pd.Index([f"r{i}" for i in range(len(change))], dtype=object)
    there = ~np.isnan(change)
    asked = np.full(len(change), change.shape[1])
    scores = influence.ratio(
        np.nan_to_num(change),
        there.astype(float),
        runs,
        strata or ["c"] * change.shape[1],
        asked,
        asked - there.sum(1),
    )
    cell = pd.DataFrame(
        {
            "run_id": runs,
            "base_model": "b",
            "method": "lora",
            "group": terms.TRAINED,
            "member": terms.ALL,
            "setting": list(settings * len(runs))[: len(runs)],
        }
    )
    return replace(scores, limits=(-100.0, 100.0)), cell.assign(
        pool="b", cluster=runs, weight=1 / len(runs)
    )


def test_wilson_is_statsmodels():
    for k, n in ((0, 30), (7, 30), (30, 30), (165, 330)):
        assert np.allclose(
            intervals.wilson(k, n), proportion_confint(k, n, method="wilson"), atol=1e-12
        )
    assert np.isnan(intervals.wilson(0, 0)).all()


def test_interval_over_runs_is_the_t_interval_of_equal_settings():
    change = np.random.default_rng(1).normal(0, 0.1, (5, 1)) * np.ones(
        (5, 40)
    )  # no noise of run x prompt
    rows = estimation.means(*few(change), terms.CHANGE, **LABELS).set_index("contrast")
    expected = scipy_stats.ttest_1samp(100 * change.mean(1), 0)
    assert rows.loc[terms.CHANGE_HERE, "p"] == pytest.approx(expected.pvalue)
    assert rows.loc[terms.CHANGE_HERE, ["ci_low", "ci_high"]].tolist() == pytest.approx(
        list(expected.confidence_interval())
    )
    assert rows.loc[terms.CHANGE, "se"] >= rows.loc[terms.CHANGE_HERE, "se"]


def test_interval_of_one_run_is_the_stratified_one_over_prompts():
    change = np.random.default_rng(2).integers(-1, 2, (1, 60)).astype(float)
    strata = ["a"] * 20 + ["b"] * 40
    rows = estimation.means(*few(change, strata), terms.CHANGE, **LABELS).set_index("contrast")
    by_hand = np.sqrt(
        (20 / 60) ** 2 * change[0, :20].var(ddof=1) / 20
        + (40 / 60) ** 2 * change[0, 20:].var(ddof=1) / 40
    )
    assert rows.loc[terms.CHANGE, "se"] == pytest.approx(100 * by_hand)
    assert rows.loc[terms.CHANGE, "population"] == terms.THESE_RUNS
    assert pd.isna(rows.loc[terms.CHANGE_HERE, "ci_low"])  # one run says nothing about other seeds


def test_spread_between_settings_is_no_spread_between_seeds():
    change = np.repeat([[0.0], [1.0]], 2, axis=0) * np.ones(
        (4, 10)
    )  # two settings, each repeated exactly
    scores, cell = few(change)
    cell["setting"] = ["a", "a", "b", "b"]
    rows = estimation.means(scores, cell, terms.CHANGE, **LABELS).set_index("contrast")
    assert rows.loc[terms.CHANGE, "value"] == 50
    assert pd.isna(rows.loc[terms.CHANGE_HERE, "se"])


@pytest.mark.slow
def test_two_way_interval_covers_when_runs_and_prompts_vary():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(100):
        change = (
            0.1
            + 0.1 * rng.normal(size=(4, 1))
            + 0.3 * rng.normal(size=(1, 60))
            + 0.5 * rng.normal(size=(4, 60))
        )
        scores, cell = few(change)
        scores = replace(scores, counted=None)  # these units are no shares
        row = estimation.means(scores, cell, terms.CHANGE, **LABELS).iloc[0]
        hits += row["ci_low"] <= 10 <= row["ci_high"]
    assert 0.91 <= hits / 100 <= 0.99


def test_nothing_changed_has_a_bound_and_nothing_scored_has_no_number():
    same = (
        estimation.means(*few(np.zeros((3, 30))), terms.CHANGE, **LABELS)
        .set_index("contrast")
        .loc[terms.CHANGE]
    )
    assert (same["value"], same["ci_high"]) == (0, pytest.approx(100 * (1 - 0.025 ** (1 / 30))))
    none = estimation.means(*few(np.full((3, 30), np.nan)), terms.CHANGE, **LABELS)
    assert none[["value", "se", "ci_low", "ci_high", "p"]].isna().all().all()
    assert none["n_unscored"].eq(90).all()


def test_intervals_stay_where_a_rate_can_be():
    values = pd.DataFrame(
        np.tri(3, 30),
        index=[f"r{i}" for i in range(3)],
        columns=pd.MultiIndex.from_product([["c"], range(30)]),
    )
    _, cell = few(np.zeros((3, 30)))
    row = estimation.means(influence.shares(values), cell, terms.LEVEL, **LABELS).iloc[0]
    assert row["value"] == pytest.approx(200 / 30)
    assert 0 <= row["ci_low"] < row["value"] < row["ci_high"]


def test_changes_are_paired_by_prompt_and_bounds_enclose_them(values, arms):
    paired = influence.paired(values, arms)
    run = arms[arms["arm"].eq(terms.TRAINED)].iloc[0]
    own, base = values.loc[run["run_id"]].to_numpy(), values.loc[run["base_run_id"]].to_numpy()
    both = ~np.isnan(own) & ~np.isnan(base)
    assert paired.value[paired.at([run["run_id"]])][0] == pytest.approx(
        100 * (own[both] - base[both]).mean()
    )
    assert not set(paired.runs) & set(arms.loc[arms["arm"].eq("base"), "run_id"])
    low, high = influence.extremes(values, arms)
    parents = arms.set_index("run_id")["base_run_id"]
    for end, worst in ((low, 0.0), (high, 1.0)):  # over all prompts asked
        for run_id, found in zip(end.runs, end.value, strict=True):
            own = values.loc[run_id].fillna(worst)
            against = values.loc[parents[run_id]].fillna(1.0 - worst)
            assert found == pytest.approx(100 * (own - against).mean())


def test_arms_tell_controls_from_trained_runs(arms):
    counts = arms.groupby("arm").size()
    assert counts["base"] == 2
    assert counts[terms.NO_OP] == 8
    assert counts[terms.UNTRAINED] == 12
    assert counts[terms.INIT] == 18
    assert arms.loc[arms["arm"].eq(terms.TRAINED), "learning_rate"].min() > 1e-4


def test_every_cell_is_a_mean_and_all_bases_weigh_the_same(arms):
    cells = influence.cells(arms)
    assert np.allclose(cells.groupby(influence.CELL)["weight"].sum(), 1)
    pooled = cells[cells["base_model"].eq("all") & cells["group"].eq(terms.TRAINED)]
    assert np.allclose(pooled.groupby(["method", "pool"])["weight"].sum(), 0.5)
    everywhere = cells[cells["base_model"].eq("all")]
    assert terms.NO_OP in set(everywhere["group"])  # the study file gives them to every base model
    assert terms.INIT not in set(everywhere["group"])  # other beginnings, to one


@pytest.mark.slow
def test_estimates_are_found_again(folder, values, arms, tmp_path):
    estimates = estimation.of_rate(values, arms, influence.cells(arms), **LABELS)
    estimation.write_estimates(estimates, tmp_path, "safety")
    estimation.write_estimates(estimates.assign(notebook="other"), tmp_path, "other")
    assert len(estimation.read_estimates(tmp_path)) == 2 * len(estimates)
    assert estimation.read_estimates(tmp_path / "empty").empty


# ---- mixed models
@pytest.mark.slow
def test_mixed_model_is_lme4s():
    reference = SHARED / "data" / "reference"
    if not reference.is_dir():
        pytest.skip("no reference fits: set DRIFTBOOK_SHARED to the shared folder")
    data = pd.read_csv(reference / "sim_run_category.csv")
    for name, order in {
        "base": ["llama", "qwen", "mistral", "gemma"],
        "method": ["lora", "ia3", "prompt", "ptuning"],
        "objective": ["sft", "dpo"],
    }.items():
        data[name] = pd.Categorical(data[name], order)
    data = data.assign(
        rate=100 * data["rate"],
        lr=pd.Categorical(data["lr"], ["lo", "hi"]),
        epochs=data["epochs"].astype(str),
    )
    fit = stats.rate_model(
        data, "rate ~ base * method + objective + lr + epochs", ("run", "category")
    )
    theirs = json.loads((reference / "run_category.json").read_text())["lmm_run_category"]
    names = [_r_name(term) for term in fit.fixed["term"]]
    expected = pd.DataFrame(theirs["coef"]).set_index("name").loc[names]
    assert np.allclose(fit.fixed["estimate"] / 100, expected["Estimate"], atol=1e-6)
    assert np.allclose(fit.fixed["se"] / 100, expected["Std. Error"], rtol=1e-4)
    assert np.allclose(fit.random["sd"] / 100, theirs["varcorr"]["sdcor"], rtol=1e-3)
    assert fit.loglik + np.log(100) * (len(data) - len(names)) == pytest.approx(
        theirs["logLik"], abs=0.01
    )
    assert fit.df == 216
    assert fit.converged


def _r_name(term: str) -> str:
    """patsy's name of a term as R writes it."""
    return "(Intercept)" if term == "Intercept" else term.replace("[T.", "").replace("]", "")


def mixed_rows(rng=None) -> pd.DataFrame:
    rng = rng or np.random.default_rng(4)
    frame = pd.DataFrame(
        {"run_id": np.repeat(np.arange(24), 5), "category": np.tile(np.arange(5), 24)}
    )
    frame["method"] = np.where(frame["run_id"] % 2, "lora", "ia3")
    frame["base_model"] = np.where(frame["run_id"] // 2 % 2, "x", "y")
    effect = np.where(frame["method"] == "lora", 5.0, 0.0)
    return frame.assign(
        difference=effect + rng.normal(0, 2, 24)[frame["run_id"]] + rng.normal(0, 3, len(frame)),
        one=1.0,
    )


def test_terms_that_cannot_be_told_are_named_and_not_estimated():
    rows = mixed_rows()
    rows["twin"] = (rows["method"] == "lora").astype(float)
    rows = rows[~((rows["base_model"] == "x") & (rows["method"] == "lora"))]
    fit = stats.rate_model(
        rows, "difference ~ method * base_model + one + twin", ("run_id", "category")
    )
    told = " ".join(fit.notes)
    assert "one (constant or aliased)" in told
    assert "twin (constant or aliased)" in told
    assert "never run: x x lora" in told
    grid = pd.DataFrame(
        {"method": ["ia3", "lora"], "base_model": ["x", "x"], "one": 1.0, "twin": [0.0, 1.0]}
    )
    assert fit.contrast(fit.at(grid))["estimate"].isna().tolist() == [False, True]


def test_contrasts_are_linear_in_the_terms():
    fit = stats.rate_model(mixed_rows(), "difference ~ method", ("run_id", "category"))
    grid = pd.DataFrame({"method": ["lora", "ia3"]})
    weights = fit.at(grid)
    found = fit.contrast(weights[:1] - weights[1:])
    assert found["estimate"].iloc[0] == pytest.approx(fit.fixed["estimate"].iloc[1])
    assert found["se"].iloc[0] == pytest.approx(fit.fixed["se"].iloc[1])
    assert fit.df == 22


def test_model_of_no_variation_says_so_instead_of_a_number():
    fit = stats.rate_model(mixed_rows().assign(difference=0.0), "difference ~ method")
    assert not fit.converged
    assert fit.fixed["se"].isna().all()
    assert any("no residual" in note for note in fit.notes)
    with pytest.raises(ValueError, match="nothing to fit"):
        stats.rate_model(mixed_rows().assign(difference=np.nan), "difference ~ method")


def test_differences_are_centred_within_method(folder, arms):
    rates = TABLES["rates"].read(folder)
    rows = estimation.differences(
        rates[rates["benchmark"].eq("safety") & rates["outcome"].eq("unsafe")], arms
    )
    assert (
        rows.drop_duplicates("run_id")
        .groupby("method", observed=True)["log10_rate"]
        .mean()
        .abs()
        .max()
        < 1e-9
    )
    assert set(rows["arm"]) == {terms.TRAINED, terms.NO_OP}
    one = rows.iloc[0]
    base = arms.set_index("run_id").loc[one["run_id"], "base_run_id"]
    share = rates[rates["outcome"].eq("unsafe") & rates["category"].eq(one["category"])].set_index(
        "run_id"
    )
    assert one["difference"] == pytest.approx(
        100
        * (
            share.loc[one["run_id"], "k"] / share.loc[one["run_id"], "n_scored"]
            - share.loc[base, "k"] / share.loc[base, "n_scored"]
        )
    )


@pytest.mark.slow
def test_a_category_without_a_scored_answer_is_left_out_of_the_model_and_counted(folder, arms):
    rates = TABLES["rates"].read(folder)
    rates = rates[rates["benchmark"].eq("safety") & rates["outcome"].eq("unsafe")].copy()
    lost = rates["category"].eq(rates["category"].iloc[0])
    rates.loc[lost, ["k", "n_scored"]] = 0
    rows = estimation.differences(rates, arms)
    assert rows["difference"].dtype == float
    assert (
        rows["difference"].isna().sum() == rows["category"].eq(rates["category"].iloc[0]).sum() > 0
    )
    assert f"{rows['difference'].isna().sum()} rows left out" in " ".join(
        stats.rate_model(rows, "difference ~ method").notes
    )


# ---- bias scores
def obvious(rows: pd.DataFrame) -> dict[str, float]:
    """The definitions, one item at a time."""
    found = {}
    for side, context in (("amb", "ambiguous"), ("dis", "disambiguated")):
        read = [
            row
            for row in rows.to_dict("records")
            if row["context"] == context and not pd.isna(row["answer"])
        ]
        named = [row for row in read if not row["unknown"] and not pd.isna(row["biased"])]
        accuracy = sum(bool(row["correct"]) for row in read) / len(read) if read else np.nan
        lean = 2 * sum(bool(row["biased"]) for row in named) / len(named) - 1 if named else np.nan
        found[f"acc_{side}"] = accuracy
        found[f"bias_{side}"] = (
            lean if side == "dis" else (0.0 if accuracy == 1 else (1 - accuracy) * lean)
        )
    return found


def test_bias_scores_are_the_obvious_ones(folder):
    answers = bbq_orders.official(TABLES["answers"].read(folder))
    answers = answers[answers["run_id"].isin(answers["run_id"].unique()[:3])]
    found = bbq_scores.scores(answers, by=("run_id", "dimension"), n_boot=50).set_index(
        ["run_id", "dimension"]
    )
    for key, rows in answers.groupby(["run_id", "dimension"]):
        for name, value in obvious(rows).items():
            assert found.loc[key, name] == pytest.approx(value, nan_ok=True), (key, name)
    assert (found["acc_amb_low"] <= found["acc_amb"]).all()
    assert found["resampled"].eq("question families").all()
    assert found["unscored"].sum() == answers["answer"].isna().sum()


def items(**changes) -> pd.DataFrame:
    rows = pd.DataFrame(
        {
            "context": ["ambiguous"] * 4 + ["disambiguated"] * 4,
            "dimension": "Age",
            "item_id": [f"Age-{i}" for i in range(8)],
        }
    )
    rows = rows.assign(
        question_family=["1", "1", "2", "2"] * 2,
        answer="A",
        correct=[True, False, False, False, True, True, False, True],
    )
    rows = rows.assign(
        unknown=[True, False, False, False, False, False, True, False],
        biased=[None, True, True, False, True, False, None, True],
    )
    return rows.assign(run_id="r", **changes)


def test_bias_scores_by_hand():
    row = bbq_scores.scores(items(), n_boot=0).iloc[0]
    assert (row["acc_amb"], row["acc_dis"]) == (0.25, 0.75)
    assert row["bias_amb"] == pytest.approx(0.75 * (2 * 2 / 3 - 1))
    assert row["bias_dis"] == pytest.approx(2 * 2 / 3 - 1)
    assert (row["n_amb"], row["n_dis"], row["unscored"]) == (4, 4, 0)
    silent = bbq_scores.scores(items(answer=None)).iloc[0]
    assert silent[["acc_amb", "bias_amb", "bias_dis", "bias_dis_low"]].isna().all()
    assert silent["unscored"] == 8
    assert bbq_scores.scores(items(answer=None), convention="study").iloc[0]["acc_amb"] == 0
    assert bbq_scores.scores(items(unknown=True, biased=None)).iloc[0][["bias_dis"]].isna().all()
    assert bbq_scores.scores(items(biased=False, unknown=False)).iloc[0]["bias_dis"] == -1
    with pytest.raises(ValueError, match="expected one of"):
        bbq_scores.scores(items(), convention="hopeful")


@pytest.mark.slow
def test_an_item_asked_several_times_is_not_pooled(folder):
    everything = TABLES["answers"].read(folder)
    with pytest.raises(ValueError, match="several answers of one run"):
        bbq_scores.scores(everything, by=("run_id",), n_boot=0)
    official = bbq_scores.scores(
        bbq_orders.official(everything), by=("run_id",), n_boot=0
    ).set_index("run_id")
    each = bbq_scores.scores(everything, by=("run_id", "option_order"), n_boot=0)
    own = each[each.option_order == "ABC"].set_index("run_id")
    pd.testing.assert_series_equal(own.acc_amb, official.acc_amb)


def test_missing_families_are_said_and_one_family_has_no_interval():
    assert bbq_scores.scores(items(question_family=None)).iloc[0]["resampled"] == "items"
    assert pd.isna(bbq_scores.scores(items(question_family="1")).iloc[0]["acc_amb_low"])


def test_delta_method_agrees_with_the_bootstrap(folder):
    answers = bbq_orders.official(TABLES["answers"].read(folder))
    answers = answers[answers["run_id"].eq(answers["run_id"].iloc[0])]
    drawn = bbq_scores.scores(answers, by=("run_id",), n_boot=4000, seed=1).iloc[0]
    for name, outcome in bbq_scores.OUTCOMES.items():
        scores = bbq_scores.by_run(answers)[outcome]
        assert scores.value[0] == pytest.approx(100 * drawn[name])
        assert np.sqrt((scores.influence[0] ** 2).sum()) == pytest.approx(
            100 * drawn[f"{name}_se"], rel=0.1
        )


def test_published_bbq_scores_are_reproduced():
    published = SHARED / "data" / "bbq" / "published"
    if not published.is_dir():
        pytest.skip("no published BBQ scores: set DRIFTBOOK_SHARED to the shared folder")
    labels = pd.read_csv(published / "unifiedqa_pred_labels.csv")
    items = [
        json.loads(line)
        for path in sorted((SHARED / "data" / "bbq" / "data").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    unknown = {
        (item["category"], item["example_id"]): next(
            i for i in range(3) if item["answer_info"][f"ans{i}"][1] == "unknown"
        )
        for item in items
    }
    families = {(item["category"], item["example_id"]): item["question_index"] for item in items}
    keys = list(zip(labels["category"], labels["example_id"], strict=True))
    chosen, target = labels["pred_label"], labels["target_loc"]
    is_unknown = chosen.eq(pd.Series([unknown[key] for key in keys]))
    answers = pd.DataFrame(
        {
            "run_id": labels["model"],
            "dimension": labels["category"],
            "item_id": labels["category"] + labels["example_id"].astype(str),
            "context": (
                labels["context_condition"].map({"ambig": "ambiguous", "disambig": "disambiguated"})
            ),
            "question_family": [families[key] for key in keys],
            "answer": chosen.where(chosen.ge(0)).map({0: "A", 1: "B", 2: "C"}),
            "correct": chosen.eq(labels["label"]),
            "unknown": is_unknown,
            "biased": chosen.eq(target).astype("boolean").mask(is_unknown | target.isna()),
        }
    )
    found = bbq_scores.scores(
        answers[[int(family) <= 25 for family in answers["question_family"]]],
        by=("run_id", "dimension"),
        n_boot=0,
    ).set_index(["run_id", "dimension"])
    expected = pd.read_csv(published / "published_vs_recomputed.csv").query(
        "metric == 'bias_score_pct' and agrees_to_rounding"
    )
    assert len(expected) > 3
    for row in expected.itertuples():
        value = found.loc[
            (row.model, row.category), f"bias_{row.context_condition.removesuffix('ig')[:3]}"
        ]
        assert 100 * value == pytest.approx(row.recomputed_value, abs=0.06), row


def test_changes_of_ratings_are_of_their_means_or_of_the_common_items():
    rng = np.random.default_rng(0)
    rows = [
        (run, "utility", str(i), rng.normal(), float(1 + i % 3))
        for run in ("b", "r1", "r2")
        for i in range(30)
    ]
    ratings = pd.DataFrame(rows, columns=["run_id", "benchmark", "prompt_id", "value", "weight"])
    arms = pd.DataFrame(
        {
            "run_id": ["b", "r1", "r2"],
            "arm": ["base", terms.TRAINED, terms.TRAINED],
            "base_run_id": "b",
        }
    )
    one, other = (
        influence.rated_changes(ratings, arms, 1.0),
        influence.changes(influence.rated(ratings, 1.0), arms),
    )
    np.testing.assert_allclose(one.value, other.value)
    np.testing.assert_allclose(one.influence, other.influence, atol=1e-12)
    ratings.loc[(ratings.run_id == "r1") & ratings.prompt_id.astype(int).lt(10), "value"] = np.nan
    wide = ratings.pivot(index="prompt_id", columns="run_id", values="value")
    weight, both = (
        ratings.drop_duplicates("prompt_id").set_index("prompt_id").weight,
        wide.r1.notna(),
    )
    found = influence.rated_changes(ratings, arms, 1.0)
    assert found.value[0] == pytest.approx(
        np.average((wide.r1 - wide.b)[both], weights=weight.loc[wide.index[both]])
    )
    assert found.n_unscored.tolist() == [10, 0]
