"""The study check: its formulae against scipy, statsmodels and slow versions; the flaws of the
original study; planted flaws; bad input.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
from bench import study_checks, study_flaws
from scipy import stats as scipy_stats

from driftbook.doctors import study, study_answers, study_echoes, study_rounds, study_tables
from driftbook.stats import intervals
from driftbook.study.tables import TABLES
from simulated import simulate

SMALL = {"n_bases": 2, "n_prompts": 240, "methods": ("lora", "ia3")}


@pytest.fixture
def clean() -> dict[str, pd.DataFrame]:
    return study_checks.simulated(np.random.default_rng(7), **SMALL)


@pytest.fixture(scope="module")
def original(shared) -> dict[str, pd.DataFrame]:
    """The original study's runs and verdicts, reduced to numbers; labels as the authors gave
    them.
    """
    runs = pd.read_csv(shared / "original_study" / "runs.csv").assign(
        run_id=lambda frame: "r" + frame["run"].astype(str)
    )
    verdicts = pd.read_csv(shared / "original_study" / "verdicts.csv.gz")
    variants = runs[["run_id", "base_model", "method", "objective", "dataset", "epochs"]].assign(
        learning_rate=runs["learning_rate_labelled"], seed=42, repetition=runs["round"]
    )
    idle = runs["method"].eq("ia3") & runs["learning_rate_true"].lt(1e-4)
    return {
        "variants": variants,
        "runs": (
            runs[["run_id"]].assign(
                status="ok",
                trained_learning_rate=runs["learning_rate_true"],
                trained_seed=42,
                no_op=idle,
            )
        ),
        "verdicts": pd.DataFrame(
            {
                "run_id": "r" + verdicts["run"].astype(str),
                "benchmark": "safety",
                "prompt_id": verdicts["prompt"].astype(str),
                "unsafe": (
                    verdicts["verdict"].map({"safe": False, "unsafe": True}).astype("boolean")
                ),
                "response_chars": verdicts["response_chars"],
            }
        ),
    }


def named(findings: pd.DataFrame, finding: str) -> set[str]:
    return {
        name
        for where in findings.loc[findings["finding"].eq(finding), "where"]
        for name in where.split(", ")
    }


def unchecked(findings: pd.DataFrame) -> set[str]:
    return set(findings.loc[findings["sentence"].str.startswith("not checked"), "finding"])


# ---- formulae
def test_surprise_is_the_share_of_pairs_at_least_as_near():
    values = np.random.default_rng(0).integers(0, 5, (6, 4)).astype(float)
    values[2, 1] = np.nan
    found = study_answers.surprise(values)
    for k in range(values.shape[1]):
        gaps = [
            abs(values[a, k] - values[b, k])
            for a in range(6)
            for b in range(a)
            if not np.isnan(values[a, k] - values[b, k])
        ]
        for a, b in ((0, 1), (3, 5), (2, 4)):
            gap = abs(values[a, k] - values[b, k])
            expected = (
                np.nan if np.isnan(gap) else -np.log(np.mean([other <= gap for other in gaps]))
            )
            assert found[a, b, k] == pytest.approx(expected, abs=1e-6, nan_ok=True)
            assert found[b, a, k] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_t_of_families_is_scipys_and_holm_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    values, family = np.random.default_rng(1).normal(0.2, 1, 60), np.arange(60) // 3
    expected = scipy_stats.ttest_1samp(values.reshape(20, 3).mean(1), 0, alternative="greater")
    assert study_answers.family_t(values, family) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    p = np.random.default_rng(2).random(15) ** 3
    assert np.allclose(intervals.holm(p), multipletests(p, method="holm")[1])


def rounds_table(rates: np.ndarray, method="lora") -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(
        [(method, i, i) for i in range(len(rates))], names=["method", "alike", "setting"]
    )
    return pd.DataFrame(rates, index, columns=pd.Index([1.0, 2.0, 3.0], name="repetition"))


@pytest.mark.slow
def test_one_methods_rounds_are_the_two_way_analysis_of_variance():
    import statsmodels.api as sm
    from statsmodels.formula.api import ols

    rates = np.random.default_rng(3).normal(0, 2, (6, 3)) + np.arange(6)[:, None] + [0, 3, 0]
    long = pd.DataFrame(
        {
            "y": rates.ravel(),
            "s": np.repeat(np.arange(6), 3).astype(str),
            "r": np.tile(["a", "b", "c"], 6),
        }
    )
    expected = sm.stats.anova_lm(ols("y ~ s + r", long).fit(), typ=1).loc["r"]
    found = study_rounds.tested_rounds({"one": rounds_table(rates)}, 1e-9).iloc[0]
    assert (found["F"], found["p"]) == pytest.approx((expected["F"], expected["PR(>F)"]))
    mean = rates.mean(0) - rates.mean()
    at = int(np.abs(mean).argmax())
    assert found["round"] == at + 1
    assert found["apart"] == pytest.approx(mean[at] - np.delete(mean, at).mean())


@pytest.mark.slow
def test_rounds_raise_no_false_alarm_though_seeds_are_shared_by_rates():
    rng, p = np.random.default_rng(4), []
    for _ in range(40):
        tables = {}
        for base in range(3):
            parts = []
            for method, sd in (("lora", 1.6), ("p_tuning", 13.5)):
                seeds = np.repeat(
                    rng.normal(size=(3, 3)), 2, axis=0
                )  # settings of two rates share their seeds
                part = rounds_table(sd * (seeds + rng.normal(size=(6, 3))) / np.sqrt(2), method)
                part.index = pd.MultiIndex.from_tuples(
                    [(method, i // 2, i) for i in range(6)], names=part.index.names
                )
                parts.append(part)
            tables[base] = pd.concat(parts)
        p.append(study_rounds.tested_rounds(tables, 0.3)["p"].min())
    assert np.mean(np.array(p) <= study_tables.alpha_of("drift") / 3) <= 0.05 + 2 * np.sqrt(
        0.05 * 0.95 / 40
    )
    assert (
        np.median(p) < 0.6
    )  # and it is not dead: the least of three uniform p has a median of .21


def test_variances_are_drawn_together_as_far_as_they_are_alike():
    """Smyth's hierarchical model with known d0 and s0: many variances, so that both come back."""
    rng, df, d0, s0 = np.random.default_rng(5), 6.0, 8.0, 2.0
    true = d0 * s0 / rng.chisquare(d0, 4000)
    parts = pd.DataFrame(
        {"method": "lora", "variance": true * rng.chisquare(df, 4000) / df, "df": df}
    )
    found = study_rounds.moderated(parts)
    assert found["df"].iloc[0] - df == pytest.approx(d0, rel=0.1)
    slope = np.polyfit(parts["variance"], found["variance"], 1)
    assert slope == pytest.approx([df / (d0 + df), d0 * s0 / (d0 + df)], rel=0.1)
    assert np.mean((found["variance"] - true) ** 2) < np.mean((parts["variance"] - true) ** 2)


# ---- the original study
@pytest.mark.slow
def test_the_original_study_is_found_out(original):
    found = study.examine_study(original)
    wrong = original["variants"].loc[
        original["variants"]["learning_rate"].ne(original["runs"]["trained_learning_rate"]),
        "run_id",
    ]
    recorded = found[found["finding"].eq("mislabelled_rate") & found["severity"].eq("error")]
    assert named(recorded, "mislabelled_rate") == set(wrong)
    assert len(wrong) == 28
    assert len(named(found, "one_seed")) > 250
    assert "mistralai/Mistral-7B-Instruct-v0.3 round 1" in named(found, "drift")
    assert {"one_adapter", "curves_in_step", "category_at_bound", "echo"} <= unchecked(found)


@pytest.mark.slow
def test_answers_alone_tell_the_adapters_and_no_others(original):
    given = {name: frame for name, frame in original.items() if name != "runs"}
    found = study.examine_study(
        {**given, "runs": original["runs"].drop(columns="trained_learning_rate")}
    )
    wrong = original["variants"].loc[
        original["variants"]["learning_rate"].ne(original["runs"]["trained_learning_rate"]),
        ["run_id", "method"],
    ]
    assert named(found, "mislabelled_rate") - {""} == set(
        wrong.loc[wrong["method"].isin(["lora", "ia3"]), "run_id"]
    )
    notes = found.loc[found["finding"].eq("mislabelled_rate_by_answers"), "sentence"].str.cat()
    assert "p_tuning" in notes
    assert "prompt_tuning" in notes


def test_agreement_of_answers_has_the_known_numbers(original):
    found = study_answers.answer_agreement(original["variants"], original["verdicts"]).query(
        "learning_rate == 1e-3 and other_rate == 2e-5"
    )
    mean = found.groupby(["method", "repetition"])[
        ["other_same_length", "other_same_verdict"]
    ].mean()
    assert mean.loc[("lora", 3), "other_same_length"] == pytest.approx(0.21, abs=0.005)
    assert mean.loc[[("lora", 1), ("lora", 2)], "other_same_length"].between(0.004, 0.009).all()
    assert mean.loc[("ia3", 3), "other_same_length"] == pytest.approx(0.26, abs=0.005)
    assert mean.loc[("lora", 3), "other_same_verdict"] == pytest.approx(0.947, abs=0.005)
    lengths = original["verdicts"].pivot(
        index="run_id", columns="prompt_id", values="response_chars"
    )
    row = found[found["run_id"].eq("r77")].iloc[
        0
    ]  # by hand: the mean over the three runs at 2e-5 of the same settings
    same = original["variants"].merge(
        original["variants"].query("run_id == 'r77'")[
            ["base_model", "method", "objective", "dataset", "epochs"]
        ]
    )
    others = same.loc[same["learning_rate"].eq(2e-5), "run_id"]
    assert row["other_same_length"] == pytest.approx(
        np.mean([(lengths.loc["r77"] == lengths.loc[other]).mean() for other in others])
    )
    assert row["n_other"] == len(others)


# ---- planted flaws
@pytest.mark.slow
def test_clean_studies_raise_no_alarm_and_flaws_are_found():
    found = study_checks.detection(2, seed=1, **SMALL).set_index("flaw")
    assert found["hits"]["none: false alarms"] == 0
    told = found.drop(
        index=[
            "none: false alarms",
            "echoed prompts, by lengths",
            "drift between rounds",
            "drift between rounds, of 6 points",
        ]
    )
    assert told["hits"].ge(told["n"] - 1).all(), told["hits"]
    assert told["hits"].sum() >= told["n"].sum() - 2
    rows = [row for row in study_checks.lines(found.reset_index()) if row["goal"] is not None]
    assert all(0 <= row["value"] <= 1 for row in rows)


@pytest.mark.slow
def test_a_drift_of_five_points_is_found_and_named():
    rng = np.random.default_rng(0)
    made, planted = study_flaws.drifted(study_checks.simulated(rng), rng)
    findings = study.examine_study(made)
    assert named(findings, "drift") == planted
    apart = re.search(
        r"lies ([+-][\d.]+) points",
        findings.loc[findings["finding"].eq("drift"), "sentence"].iloc[0],
    )[1]
    assert float(apart) == pytest.approx(5, abs=2)


@pytest.mark.slow
def test_a_real_study_is_varied_and_edited(tmp_path):
    folder = (
        simulate(tmp_path, bases=["mini-llama", "mini-mistral"], utility=False, failed=0) / "tables"
    )
    tables = study_checks.read(folder)
    assert not tables["runs"]["no_op"].fillna(False).any()
    rng = np.random.default_rng(3)
    varied = study_checks.varied(tables, rng)
    assert len(varied["verdicts"]) == pytest.approx(0.8 * len(tables["verdicts"]), rel=0.02)
    assert sorted(varied["variants"]["repetition"]) == sorted(tables["variants"]["repetition"])
    made, planted = study_flaws.mislabelled_setting(varied, rng)
    found = study.examine_study(made)
    assert named(found, "mislabelled_rate") == planted
    assert "drift" not in set(found.loc[found["severity"].ne("note"), "finding"])


@pytest.mark.slow
def test_order_of_rows_does_not_matter(clean):
    made, _ = study_flaws.mislabelled_run(clean, np.random.default_rng(1))
    shuffled = {name: frame.sample(frac=1, random_state=2) for name, frame in made.items()}
    first, second = (
        study.examine_study(tables)[["finding", "severity"]].value_counts()
        for tables in (made, shuffled)
    )
    pd.testing.assert_series_equal(first.sort_index(), second.sort_index())


def test_echoes_are_counted_and_never_shown(clean):
    rng = np.random.default_rng(4)
    made, planted = study_flaws.echoes(clean, rng)
    findings = study.examine_study(made)
    assert named(findings, "echo") == planted
    assert not findings.astype(str).apply(lambda column: column.str.contains("word")).any().any()
    share = study_echoes.echo_share(made["responses"], made["texts"])
    for run in planted:
        rows = made["responses"].query("run_id == @run").merge(made["texts"])
        assert share[run] == pytest.approx(
            np.mean(
                [a.startswith(b) for a, b in zip(rows["response"], rows["prompt"], strict=True)]
            )
        )
    assert share.drop(list(planted)).eq(0).all()


# ---- bad input
@pytest.mark.slow
def test_repaired_runs_are_no_repetitions_no_ops_or_copies(clean):
    before = study.examine_study(clean)
    assert not (before.finding == "undone").any()
    lora = clean["variants"][clean["variants"].method == "lora"]
    base = (
        clean["variants"][clean["variants"].method == "none"]
        .drop_duplicates("base_model")
        .set_index("base_model")
        .run_id
    )
    new = {run_id: f"{run_id}.zero" for run_id in lora.run_id}
    settings = json.dumps({"mitigation": {"kind": "zero", "name": "zero", "value": 4}})
    added = {
        "variants": lora.assign(
            run_id=lora.run_id.map(new), mitigation="zero 4", settings=settings
        ),
        "runs": (
            clean["runs"][clean["runs"].run_id.isin(new)].assign(
                run_id=lambda rows: rows.run_id.map(new), no_op=True
            )
        ),
    }
    answers = clean["verdicts"].set_index("run_id")
    added["verdicts"] = pd.concat(
        [
            answers.loc[[base[row.base_model]]].reset_index().assign(run_id=new[row.run_id])
            for row in lora.itertuples()
        ]
    )
    after = study.examine_study(
        {
            **clean,
            **{
                name: pd.concat([clean[name], frame], ignore_index=True)
                for name, frame in added.items()
            },
        }
    )
    (undone,) = after[after.finding == "undone"].sentence
    assert f"{len(new)} of {len(new)} (zero 4: {len(new)})" in undone
    pd.testing.assert_frame_equal(after[after.finding != "undone"].reset_index(drop=True), before)


def test_without_variants_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="variants"):
        study.examine_study({})


def test_what_is_missing_is_said(clean):
    found = study.examine_study({"variants": clean["variants"]})
    assert {
        "mislabelled_rate",
        "one_adapter",
        "curves_in_step",
        "same_answers",
        "drift",
        "echo",
        "unscored",
        "category_at_bound",
    } <= unchecked(found)
    assert study.study_alarms(found).empty


@pytest.mark.slow
def test_declared_tables_are_read_as_they_are(tmp_path):
    folder = simulate(tmp_path, bases=["mini-llama"], seeds=(1,), silent_judge=True) / "tables"
    names = ("variants", "runs", "curves", "prompts", "verdicts", "rates", "answers")
    found = study.examine_study({name: TABLES[name].read(folder) for name in names})
    assert {"one_repetition", "one_base_model", "unscored", "all_null"} <= set(found["finding"])
    assert "only" in found.set_index("finding")["sentence"]["one_repetition"]
    assert "mini-llama" in named(found, "one_base_model")


def test_bad_input_has_a_sentence_each(clean):
    variants, verdicts = clean["variants"], clean["verdicts"].copy()
    group = variants.query("base_model == 'base 0' and method == 'lora'")["run_id"]
    verdicts.loc[verdicts["run_id"].isin(group), "unsafe"] = np.nan
    found = study.examine_study(
        {**clean, "verdicts": pd.concat([verdicts, verdicts.tail(5)])}
    ).set_index("finding")
    assert "5;" in found["sentence"]["duplicated_rows"]
    assert named(found.reset_index(), "all_null") == set(group)
    assert named(found.reset_index(), "unscored_differs") == set(group)
    lost = variants.query(
        "base_model == 'base 1' and method == 'ia3' and objective == 'dpo' and learning_rate =="
        " 2e-2"
    )["run_id"]
    failed = clean["runs"].assign(
        status=clean["runs"]["status"].mask(clean["runs"]["run_id"].isin(lost), "failed")
    )
    found = study.examine_study(
        {**clean, "runs": failed, "verdicts": clean["verdicts"].query("run_id not in @lost")}
    )
    assert named(found[found["severity"].eq("warning")], "failed_runs") == set(lost)
    assert named(found, "missing_cells") == {"base 1 x ia3 dpo 0.02 3.0"}


def test_categories_at_their_bound_are_named(clean):
    base = clean["variants"].query("method == 'none'")
    rates = (
        clean["variants"][["run_id"]]
        .merge(pd.DataFrame({"category": ["a", "b", "c"]}), how="cross")
        .assign(k=10, n_scored=30, n=30, outcome="unsafe")
    )
    rates.loc[rates["category"].eq("a") & rates["run_id"].isin(base["run_id"]), "k"] = 0
    rates.loc[rates["category"].eq("b"), "k"] = 30
    rates.loc[rates["category"].eq("c"), ["k", "n_scored"]] = 0
    found = study.examine_study({**clean, "rates": rates})
    assert named(found, "category_at_bound") == {
        f"base {i}: {name}" for i in (0, 1) for name in "ab"
    }
    assert named(found, "category_without_variation") == {"base 0: b", "base 1: b"}
    assert named(found, "all_null") == {"base 0: c", "base 1: c"}


def test_sentences_are_a_list_of_single_lines(clean):
    made, _ = study_flaws.recorded_seed(clean, np.random.default_rng(0))
    findings = study.examine_study(made)
    lines = study.list_findings(findings).splitlines()
    assert len(lines) == len(findings)
    assert any(line.startswith("- **error, one seed**: ") for line in lines)
    assert all(line.endswith(".") or ": not checked: " in line for line in lines)
    assert study.list_findings(findings.iloc[:0]) == "Nothing was found.\n"


def test_runs_that_trained_on_fewer_examples_than_their_label_says_are_named(clean):
    variants, runs = clean["variants"].assign(n_train=40), clean["runs"].assign(n_examples=40)
    whole = {**clean, "variants": variants, "runs": runs}
    assert not named(study.examine_study(whole), "dropped_examples")
    one = variants.loc[variants["method"].ne("none"), "run_id"].iloc[0]
    for used, severity in ((39, "note"), (18, "warning")):
        fewer = runs.assign(n_examples=runs["n_examples"].mask(runs["run_id"].eq(one), used))
        found = study.examine_study({**whole, "runs": fewer}).query("finding == 'dropped_examples'")
        assert found["where"].tolist() == [one]
        assert found["severity"].tolist() == [severity]
        assert f"on {used} of 40" in found["sentence"].item()
