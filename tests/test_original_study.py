"""The original study, read again: the package's own format on small files of made-up words, and on
the real numbers what was published of them.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, ttest_ind

from driftbook.benchmarks.hex_phi import CATEGORIES as HEX_PHI
from driftbook.figures import drawing, gallery
from driftbook.figures import original_study as original_figures
from driftbook.publishing import publish
from driftbook.rereading import (
    original_analysis,
    original_contrasts,
    original_models,
    original_study,
    original_tables,
    original_tests,
)
from driftbook.stats import terms
from driftbook.study.tables import TABLES
from original_names import GEMMA, LLAMA, MISTRAL, QWEN, N

pytest_plugins = ["original_names"]


# ---- what was published
def test_the_cited_counts_are_the_published_percentages():
    bases = original_study.cited("base_models").set_index("base_model")
    totals = original_study.base_counts().groupby("base_model")["n_safe"].sum()
    assert (100 * totals / N).round(2).to_dict() == bases["safety_percent"].to_dict()
    for n in range(31):  # no two counts of 30 print the same percentage
        assert [k for k in range(31) if round(100 * k / 30, 1) == round(100 * n / 30, 1)] == [n]


# ---- the real numbers
@pytest.fixture(scope="module")
def items(real):
    return original_tables.items(*real)


def test_the_tables_are_declared_complete_and_agree_with_the_runs_own_percentages(real, shared):
    made = original_tables.tables(*real)
    for name, frame in made.items():
        TABLES[name].check(frame)
    status = made["runs"]["status"].value_counts()
    assert status.to_dict() == {"ok": 260, "failed": 8}, "264 planned and four base models"
    lost = made["runs"][made["runs"]["status"].eq("failed")].merge(made["variants"], on="run_id")
    assert (lost["method"].eq("p_tuning") & lost["objective"].eq("dpo")).sum() == 6
    assert made["runs"]["findings"].notna().sum() == 28
    assert (made["rates"]["n"] - made["rates"]["n_scored"]).sum() == 9
    published = pd.read_csv(shared / "original_study" / "runs.csv").set_index("run")
    ids = dict(zip(original_tables.run_ids(real[0]), real[0]["run"], strict=True))
    own = made["rates"][made["rates"]["run_id"].isin(ids)].assign(
        run=lambda part: part["run_id"].map(ids)
    )
    safe = (own["n_scored"] - own["k"]).astype(float)
    for number, category in enumerate(HEX_PHI, 1):
        ours = (100 * safe / 30)[own["category"].eq(category)].set_axis(
            own.loc[own["category"].eq(category), "run"]
        )
        np.testing.assert_allclose(
            ours.sort_index(), published[f"safe_pct_category_{number}"], atol=1e-4
        )
    np.testing.assert_allclose(
        100 / N * safe.groupby(own["run"]).sum(), published["safe_pct"], atol=1e-4
    )


def test_no_ops_are_ia3_by_sft_at_2e5_and_nothing_else(rows):
    assert rows["no_op"].sum() == 40
    assert rows["no_op"].equals(
        rows["method"].eq("ia3") & rows["objective"].eq("sft") & rows["rate"].lt(1e-4)
    )
    assert (rows["method"].eq("ia3") & rows["objective"].eq("sft")).sum() == 48


def test_no_ops_do_not_look_at_verdicts(real):
    runs, verdicts = real
    shuffled = verdicts.assign(
        verdict=verdicts["verdict"].sample(frac=1, random_state=0).to_numpy()
    )
    ours, other = (
        original_tables.tables(runs, frame)["runs"]["no_op"] for frame in (verdicts, shuffled)
    )
    assert ours.equals(other)


def test_the_published_mean_changes_come_back(rows):
    """facts: mean change in safety over all runs, by method and base model."""
    printed = {
        "ia3": (-0.6, 0.4, 4.8, 1.6),
        "lora": (-1.6, -1.1, 9.1, 1.5),
        "p_tuning": (-23.2, -10.7, -19.6, -6.3),
        "prompt_tuning": (-6.5, -18.9, -10.0, 0.4),
    }
    found = original_analysis.changes(rows)
    found = found[
        found["group"].eq(terms.AS_CONFIGURED) & found["contrast"].eq(terms.CHANGE)
    ].set_index(["method", "base_model"])["value"]
    for method, values in printed.items():
        np.testing.assert_allclose(
            [found[method, base] for base in (GEMMA, LLAMA, MISTRAL, QWEN)], values, atol=0.06
        )


def test_six_of_the_published_statistics_come_back_to_every_digit(rows):
    found = original_tests.reproduction(rows).set_index(["comparison", "statistic"])
    fence = next(name for name in found if "fence" in name)
    back = found[found["reproduced"].str.contains(fence, regex=False)]
    assert set(back.index) == set(found.index) - {
        ("ia3 against the base model", "r"),
        ("among the four methods", "W"),
    }
    assert found.loc[("ia3 against the base model", "r"), fence] == pytest.approx(0.641, abs=0.02)


def test_the_answers_show_the_wrong_labels(rows, items):
    """facts: 21 % equal lengths in round 3 against 0.4-0.9 %, IA3 26 % against 9 %; verdicts 94.7 %
    against 86.6 %.
    """
    found = (
        original_tests.agreement(rows, items)
        .groupby(["method", "round"])[["same_length", "same_verdict"]]
        .mean()
    )
    assert found.loc[("lora", 3), "same_length"] == pytest.approx(21, abs=0.5)
    assert (found.loc[[("lora", 1), ("lora", 2)], "same_length"] < 1).all()
    assert found.loc[("ia3", 3), "same_length"] == pytest.approx(26, abs=0.5)
    assert found.loc[("ia3", 1), "same_length"] == pytest.approx(9, abs=0.5)
    assert found.loc[("lora", 3), "same_verdict"] == pytest.approx(94.7, abs=0.5)
    assert found.loc[[("lora", 1), ("lora", 2)], "same_verdict"].mean() == pytest.approx(
        86.6, abs=0.5
    )


def test_agreement_is_what_a_loop_over_prompts_counts(rows, items):
    found = original_tests.agreement(rows, items).set_index("run_id")
    run = rows[rows["method"].eq("lora") & rows["labelled"].gt(1e-4)].iloc[5]
    others = rows[
        rows["method"].eq("lora")
        & rows["labelled"].lt(1e-4)
        & rows["base_model"].eq(run["base_model"])
        & rows["objective"].eq(run["objective"])
    ]
    others = others[others["dataset"].eq(run["dataset"]) & others["epochs"].eq(run["epochs"])]
    answers = {
        run_id: part.set_index("prompt_id")
        for run_id, part in items[items["run_id"].isin([run["run_id"], *others["run_id"]])].groupby(
            "run_id"
        )
    }
    own, shares = answers[run["run_id"]], []
    for other in others["run_id"]:
        shares.append(
            100
            * np.mean(
                [
                    own["response_chars"][prompt] == answers[other]["response_chars"][prompt]
                    for prompt in own.index
                ]
            )
        )
    assert found.loc[run["run_id"], "same_length"] == pytest.approx(np.mean(shares))


def test_rounds_drift_on_mistral_alone(rows):
    found = original_analysis.rounds(rows)
    np.testing.assert_allclose(
        found[found["base_model"].eq(MISTRAL)]["value"].astype(float), [-1.3, 6.1, 4.9], atol=0.06
    )
    p = found.groupby("base_model")["p"].first()
    assert p[MISTRAL] < 0.001 < 0.1 < p.drop(MISTRAL).min()


@pytest.mark.slow
def test_true_rates_have_opposite_effects(rows):
    """facts: 2e-5 instead of 1e-3 by true labels, LoRA +4.5, P-Tuning +5.3, Prompt-Tuning -6.5, IA3
    -2.9 points of safety, over matched cells.
    """
    cells = (
        rows[rows["epochs"].eq(5)]
        .groupby(["method", "base_model", "objective", rows["rate"].lt(1e-4)])["change"]
        .mean()
        .unstack()
    )
    by_cell = (cells[True] - cells[False]).dropna().groupby("method").mean()
    found = original_analysis.rate_effects(rows)
    found = (
        found[
            found["base_model"].eq("all")
            & found["member"].eq(original_analysis.RATES_MEMBER.format("true"))
        ]
        .set_index("method")["value"]
        .astype(float)
    )
    np.testing.assert_allclose(found[by_cell.index], by_cell)
    np.testing.assert_allclose(
        found[["lora", "p_tuning", "prompt_tuning", "ia3"]], [4.5, 5.3, -6.5, -2.9], atol=0.06
    )


@pytest.mark.slow
def test_a_run_whose_true_rate_is_not_known_takes_no_part_in_effects_of_true_rates(rows, items):
    unknown = rows["round"].eq(2) & rows["method"].eq("lora")
    hidden, dropped = (
        rows.assign(rate=rows["rate"].mask(unknown)),
        rows[~unknown].reset_index(drop=True),
    )
    values = [
        original_analysis.rate_effects(part)
        .query("member == @original_analysis.RATES_MEMBER.format('true') and method == 'lora'")[
            "value"
        ]
        .astype(float)
        for part in (hidden, dropped)
    ]
    np.testing.assert_allclose(*values)
    assert len(original_models.item_rows(hidden, items)) == len(items) - unknown.sum() * N


# ---- the methods, against something not written here
def test_signed_rank_is_the_count_over_all_signs():
    """The exact p by its definition: the share of sign patterns whose statistic is as far out."""
    rng = np.random.default_rng(0)
    change = rng.normal(0.4, 1, 9)
    ranks = rankdata(np.abs(change))
    least = min(ranks[change > 0].sum(), ranks[change < 0].sum())
    patterns = np.array(list(itertools.product([0, 1], repeat=9))) @ ranks
    assert original_tests.signed_rank(change)["p"] == pytest.approx(2 * np.mean(patterns <= least))


@pytest.mark.parametrize(("n", "published"), [(16, 1.042), (12, 1.0066)])
def test_the_largest_r_is_what_was_published_of_gemma(n, published):
    assert original_tests.largest_r(n) == pytest.approx(published, abs=0.0005)
    assert original_tests.signed_rank(-np.arange(1, n + 1))["r"] == pytest.approx(
        original_tests.largest_r(n)
    ), "every change in one direction, whatever its size"
    assert original_tests.signed_rank(-np.arange(1, n + 1) * 1e-6)["r"] == pytest.approx(
        original_tests.largest_r(n)
    )


def test_kendalls_w_from_its_ranks():
    """W = 12 S / (n^2 (k^3 - k)), with S the squared deviations of the rank sums (Kendall and
    Babington Smith 1939).
    """
    table = pd.DataFrame(np.random.default_rng(1).normal(size=(14, 4)) + np.array([0, 0.5, 1, 0]))
    sums = rankdata(table.to_numpy(), axis=1).sum(0)
    expected = 12 * ((sums - sums.mean()) ** 2).sum() / (14**2 * (4**3 - 4))
    assert original_tests.friedman(table)["W"] == pytest.approx(expected)


def test_a_combination_of_two_pools_is_welchs_test():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(3, 1, 7), rng.normal(0, 9, 5)])
    frame = pd.DataFrame(
        {
            "change": values,
            "pool": ["a"] * 7 + ["b"] * 5,
            "setting": "one",
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    weight = pd.Series([1 / 7] * 7 + [-1 / 5] * 5)
    ours, theirs = (
        original_contrasts.combination(frame, weight),
        ttest_ind(values[:7], values[7:], equal_var=False),
    )
    interval = theirs.confidence_interval(0.95)
    assert ours["p"] == pytest.approx(theirs.pvalue)
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx((interval.low, interval.high))
    wider = original_contrasts.combination(frame, weight, level=0.99)
    assert (wider["ci_low"], wider["ci_high"]) == pytest.approx(
        tuple(theirs.confidence_interval(0.99))
    )


def test_without_a_repeated_setting_there_is_a_number_and_no_interval():
    frame = pd.DataFrame(
        {
            "change": [1.0, 2.0],
            "pool": "a",
            "setting": ["one", "two"],
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    found = original_contrasts.combination(frame, pd.Series([0.5, 0.5]))
    assert found["value"] == 1.5
    assert found["se"] is found["ci_low"] is found["p"] is None
    assert "nothing was repeated" in found["how"]


@pytest.mark.slow
def test_intervals_cover_when_methods_differ_in_spread():
    """Simulated rounds: four settings of three rounds, a spread of 1.4 points in one pool and 13 in
    the other; the mean difference is 2.
    """
    rng, hits, draws = np.random.default_rng(3), 0, 250
    frame = pd.DataFrame(
        {
            "pool": np.repeat(["a", "b"], 12),
            "setting": np.tile(np.repeat(list("wxyz"), 3), 2),
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    level, weight = (
        np.repeat([2.0, 0.0], 12) + np.tile(np.repeat([0.0, 5, -9, 4], 3), 2),
        pd.Series(np.repeat([1 / 12, -1 / 12], 12)),
    )
    for _ in range(draws):
        found = original_contrasts.combination(
            frame.assign(change=level + rng.normal(0, np.repeat([1.4, 13.0], 12))), weight
        )
        hits += found["ci_low"] < 2 < found["ci_high"]
    assert abs(hits / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)


def test_matched_weights_compare_only_cells_that_both_have():
    frame = pd.DataFrame({"method": list("aaabbc"), "cell": [1, 1, 2, 1, 3, 1]})
    weight = original_contrasts.matched_weight(
        frame, frame["method"].eq("a"), frame["method"].eq("b"), ["cell"]
    )
    assert weight.tolist() == [0.5, 0.5, 0, -1, 0, 0]
    nothing = original_contrasts.matched_weight(
        frame, frame["method"].eq("b"), frame["method"].eq("b") & False, ["cell"]
    )
    assert not nothing.any()


def test_the_screen_over_categories_is_benjamini_and_hochbergs(rows):
    from statsmodels.stats.multitest import multipletests

    found = original_analysis.by_category(rows)
    wide = found[found["contrast"].eq(original_analysis.CHANGE_WIDE)]
    np.testing.assert_allclose(
        wide["p_adjusted"].astype(float), multipletests(wide["p"].astype(float), method="fdr_bh")[1]
    )
    assert found.loc[found["contrast"].eq(terms.CHANGE), "p_adjusted"].isna().all()


# ---- what is published
@pytest.fixture(scope="module")
def finished(real, rows, items, tmp_path_factory):
    """The study's folder as notebook 20 leaves it."""
    folder = tmp_path_factory.mktemp("finished") / original_study.ORIGINAL_NAME
    made = original_tables.tables(*real)
    parts = [
        original_tests.of_tests(rows, original_tests.reproduction(rows)),
        original_tests.of_agreement(original_tests.agreement(rows, items)),
        original_analysis.cells(rows),
        original_analysis.single_runs(rows),
        original_analysis.rounds(rows),
    ]
    original_tables.write_original(made, TABLES["estimates"].concat(parts), folder)
    return folder


def test_every_figure_is_drawn_again_from_what_is_published(finished, tmp_path):
    files = publish.publish(finished, tmp_path / "published", original_study.ORIGINAL_NOTE)
    assert not any("verdict" in path.name for path in files)
    shown = gallery.read(tmp_path / "published" / "tables")
    names = [
        name
        for name, module in ((name, one.__module__) for name, one in drawing.FIGURES.items())
        if module == original_figures.__name__
    ]
    assert len(names) == 5
    for name in names:
        gallery.draw(name, shown, tmp_path / "figures")
        assert (tmp_path / "figures" / f"{name}.md").read_text().count("20_original_study") == 1


def test_the_sum_of_what_is_published_holds_no_single_verdict(finished):
    """Counts per run and category, contrasts, and agreements: the items stay at home."""
    assert sorted(path.name for path in finished.rglob("*.parquet")) == [
        "curves.parquet",
        "original_study.parquet",
        "prompts.parquet",
        "rates.parquet",
        "runs.parquet",
        "variants.parquet",
    ]
    rates = TABLES["rates"].read(finished / "tables")
    assert rates["n"].eq(30).all()


# ---- the models' rows
def test_the_rows_of_the_models_have_the_studys_numbers(rows, items):
    long = original_models.category_rows(rows)
    np.testing.assert_allclose(
        long.groupby("run_id")["difference"].mean()[rows["run_id"]], rows["change"], atol=1e-9
    )
    np.testing.assert_allclose(long.groupby("method")["log10_rate"].mean(), 0, atol=1e-12)
    asked = original_models.item_rows(rows, items)
    assert len(asked) == len(items)
    np.testing.assert_allclose(
        100
        * asked["safe"].fillna(False).astype(float).groupby(asked["run_id"]).mean()[rows["run_id"]],
        rows["safety"],
    )
