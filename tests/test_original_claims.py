"""The ledger of the original study's claims: the rule against what a binomial tail and a simulation
give, the readings against numbers computed once with pandas and scipy alone, and what others
published since against their own tables.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy.stats import binom, levene, t

from conftest import one_sentence
from driftbook.benchmarks.hex_phi import CATEGORIES as HEX_PHI
from driftbook.figures import gallery
from driftbook.publishing import publish
from driftbook.rereading import (
    original_claims,
    original_contrasts,
    original_ledger,
    original_quantifiers,
    original_spreads,
    original_study,
    original_tables,
    since,
)
from driftbook.rereading.original_quantifiers import (
    DEPENDS,
    EVERY,
    FALLS,
    MEAN,
    OPEN,
    REPEATS,
    SHARE,
    STANDS,
    TOTAL,
)
from original_names import GEMMA

pytest_plugins = ["original_names"]


@pytest.fixture(scope="module")
def ledger(rows):
    return original_ledger.judge_claims(rows, n_boot=200)


def reading(ledger, claim, quantifier, form=original_claims.ALL_RUNS):
    [found] = [one for one in ledger.claims[claim].forms[form] if one.quantifier == quantifier]
    return found


def numbers(one) -> tuple:
    return one.value, one.ci_low, one.ci_high


# ---- the rule
@pytest.mark.parametrize(
    ("low", "high", "region", "verdict"),
    [
        (0.1, 2, (0, math.inf), STANDS),
        (-2, -0.1, (0, math.inf), FALLS),
        (-1, 1, (0, math.inf), OPEN),
        (-2, 2, (-3, 3), STANDS),
        (-9, -4, (-3, 3), FALLS),
        (4, 9, (-3, 3), FALLS),
        (-4, 2, (-3, 3), OPEN),
        (math.nan, math.nan, (0, math.inf), OPEN),
    ],
)
def test_an_interval_decides(low, high, region, verdict):
    assert original_quantifiers.placed([low], [high], region).tolist() == [verdict]


@pytest.mark.parametrize(
    ("three", "verdict"),
    [
        ((STANDS, STANDS, STANDS), STANDS),
        ((FALLS, FALLS, FALLS), FALLS),
        ((OPEN, OPEN, OPEN), OPEN),
        ((STANDS, FALLS, STANDS), DEPENDS),
        ((STANDS, OPEN, STANDS), DEPENDS),
    ],
)
def test_a_claim_has_a_verdict_where_its_readings_agree(three, verdict):
    readings = [
        original_quantifiers.Quantified(MEAN, one, one, 0.0, 0.0, 0.0, "points", 1) for one in three
    ]
    assert original_quantifiers.claim_verdict(readings) == verdict


def partial_conjunction(p: list[float], u: int) -> float:
    """Benjamini and Heller's p by its definition (their equation 2 with Simes): the largest Simes p
    over all sets of n - u + 1 hypotheses.
    """
    size = len(p) - u + 1
    return max(
        min(size * one / rank for rank, one in enumerate(sorted(part), 1))
        for part in itertools.combinations(p, size)
    )


@given(some.lists(some.floats(0, 1), min_size=1, max_size=6), some.sampled_from([0.025, 0.2]))
def test_the_bound_on_cells_is_benjamini_and_hellers_over_all_subsets(p, level):
    found = original_quantifiers.at_least(np.array(p), level)
    assert all(partial_conjunction(p, u) <= level for u in range(1, found + 1))
    assert found == len(p) or partial_conjunction(p, found + 1) > level


def test_a_p_that_is_not_known_shows_nothing():
    assert original_quantifiers.at_least(np.array([0.001, math.nan]), 0.025) == 1


def family(values, se=1.0, df=8.0):
    """Cells with given estimates, all of one standard error."""
    one = original_contrasts.Combined(
        *(np.full(len(values), x, float) for x in (0.0, se, df, se, df, 3))
    )
    one = original_contrasts.Combined(np.asarray(values, float), *list(vars(one).values())[1:])
    names = [f"cell {i}" for i in range(len(values))]
    return original_quantifiers.Family(names, one.value, one.ends, one.above, 3 * len(values))


def test_three_readings_of_made_up_cells_differ_as_they_should():
    """Nineteen cells far above zero, one far below: the mean and the share stand, every falls."""
    cells = family([30.0] * 19 + [-30.0])
    mean = family([np.mean(cells.value)])
    found = original_quantifiers.three_readings(mean, cells, (0, math.inf), "points")
    assert [one.verdict for one in found] == [STANDS, FALLS, STANDS]
    assert numbers(found[1]) == (1, 1, 1)
    assert numbers(found[2]) == (95, 95, 95)
    assert original_quantifiers.claim_verdict(found) == DEPENDS
    assert "cell 19 -30.0" in found[1].words


def test_a_region_with_two_ends_counts_both_sides():
    cells = family([0.0, 30.0, -30.0])
    every, share = original_quantifiers.cell_readings(cells, (-3, 3))
    assert every.value == 2
    assert share.value == pytest.approx(100 / 3)
    assert every.verdict == FALLS


@pytest.mark.slow
def test_more_cells_than_are_inside_are_seldom_called_sure():
    """Eight of sixteen cells lie at the edge, so none of them is inside: in at most 2.5 % of draws
    may the bound exceed eight.
    """
    rng, truth, draws = np.random.default_rng(6), np.repeat([0.0, 5.0], 8), 1000
    said = [
        original_quantifiers.surely(
            family(truth + rng.normal(size=16), df=1000), (0, math.inf), False
        )[0]
        for _ in range(draws)
    ]
    wrong = sum(one > 8 for one in said)
    assert wrong <= binom.ppf(0.999, draws, 0.025)
    assert np.mean(said) > 7, "and it is no empty bound"


# ---- contrasts
def test_cells_count_alike_in_a_base_model_and_base_models_count_alike(rows):
    chosen = rows["method"].eq("prompt_tuning")
    by_hand = (
        rows[chosen]
        .groupby(["base_model", "objective", "dataset", "epochs", "rate"])["change"]
        .mean()
        .groupby("base_model")
        .mean()
        .mean()
    )
    weight = original_contrasts.cell_weight(rows, chosen)
    assert weight @ rows["change"] == pytest.approx(by_hand)
    assert weight.sum() == pytest.approx(1)


def test_many_contrasts_are_each_the_one():
    rng = np.random.default_rng(7)
    frame = pd.DataFrame(
        {
            "change": rng.normal(size=12),
            "pool": np.repeat(["a", "b"], 6),
            "setting": np.tile(np.repeat(["x", "y"], 3), 2),
            "base_model": np.repeat(["a", "b"], 6),
            "no_op": np.tile([True, False], 6),
            "round": np.tile([1, 2, 3], 4),
        }
    )
    weights = rng.normal(size=(4, 12))
    weights[0, 6:] = 0.0
    many = original_contrasts.combined(frame, weights)
    for wide in (False, True):
        low, high = many.ends(0.9, wide)
        for i, weight in enumerate(weights):
            one = original_contrasts.combination(
                frame, pd.Series(weight), level=0.9, uncertain_base=wide
            )
            assert (one["ci_low"], one["ci_high"]) == pytest.approx((low[i], high[i]))
    residual = frame["change"] - frame.groupby(["pool", "setting"])["change"].transform("mean")
    se = math.sqrt((weights[0] ** 2).sum() * (residual[:6] ** 2).sum() / 4)
    assert many.se[0] == pytest.approx(se)
    assert many.above(0.5)[0] == pytest.approx(t.sf((many.value[0] - 0.5) / se, 4))


# ---- spreads
def arms(rng, n_cells, sds) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "arm": np.repeat(["a", "b"], 3 * n_cells),
            "cell": np.tile(np.repeat(np.arange(n_cells), 3), 2),
        }
    )
    means = rng.normal(scale=np.repeat(sds, n_cells))
    noise = rng.normal(scale=np.repeat([1.0, 0.5], 3 * n_cells))
    return frame.assign(change=np.repeat(means, 3) + noise)


def sides(frame) -> tuple:
    return frame, frame["arm"].eq("a"), frame["arm"].eq("b"), ["cell"]


@pytest.mark.slow
def test_the_ratio_of_spreads_over_all_runs_covers_its_truth():
    rng, hits = np.random.default_rng(4), 0
    for draw in range(60):
        found = original_spreads.total_ratio(*sides(arms(rng, 20, [2.0, 1.0])), 200, draw)
        low, high = found.ends(0.95)
        hits += low < 2 < high
    assert hits >= 50, "of 60 95 % intervals"


def test_few_common_configurations_give_no_ratio():
    found = original_spreads.total_ratio(*sides(arms(np.random.default_rng(0), 2, [1, 1])), 10, 0)
    assert math.isnan(found.value)
    assert "2 common configurations" in found.how


def test_the_ratio_between_equal_runs_does_not_see_the_settings_and_covers():
    rng, hits, draws = np.random.default_rng(8), 0, 200
    for _ in range(draws):
        low, high = original_spreads.repeat_ratio(*sides(arms(rng, 8, [50.0, 1.0]))).ends(0.95)
        hits += low < 2 < high
    assert abs(hits / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)


def test_the_f_test_of_one_cell_is_the_textbooks():
    """Snedecor's F of two samples; its p agrees in order with Levene's for clear differences."""
    rng = np.random.default_rng(9)
    a, b = rng.normal(0, 3, 30), rng.normal(0, 1, 30)
    frame = pd.DataFrame(
        {"change": np.concatenate([a, b]), "arm": np.repeat(["a", "b"], 30), "cell": 0}
    )
    found = original_spreads.repeat_ratio(*sides(frame))
    assert found.value == pytest.approx(np.std(a, ddof=1) / np.std(b, ddof=1))
    assert found.p < 0.001 > levene(a, b).pvalue
    low, _ = found.ends(1 - found.p)
    assert low == pytest.approx(1), "the interval of level 1 - p ends at no difference"


# ---- the real ledger, against numbers computed with pandas and scipy alone
def test_every_claim_of_the_ledger_is_cited_and_the_other_way_round(ledger):
    assert list(original_study.cited("claims")["claim"]) == list(ledger.claims)


@pytest.mark.parametrize(
    ("claim", "form", "expected"),
    [
        ("lora_preserves", original_claims.BY_RUN, (1.96, 1.62, 2.31)),
        ("ia3_preserves", original_claims.BY_RUN, (1.56, 1.11, 2.00)),
        ("prompt_tuning_degrades", original_claims.BY_RUN, (-8.74, -10.70, -6.78)),
        ("p_tuning_degrades", original_claims.BY_RUN, (-14.93, -18.24, -11.63)),
        ("llama_stable", original_claims.BY_RUN, (-7.31, -10.18, -4.44)),
        ("qwen_gains", original_claims.BY_RUN, (-0.53, -1.59, 0.52)),
        ("gemma_steepest", original_claims.ALL_RUNS, (-1.22, -6.18, 3.75)),
    ],
)
def test_means_and_their_intervals(ledger, claim, form, expected):
    found = reading(ledger, claim, MEAN, form)
    assert numbers(found) == pytest.approx(expected, abs=0.006)


def test_means_of_chosen_runs(rows):
    """Prompt-Tuning's learned runs -3.14 (-10.60 to 4.31); Llama without outliers -1.97 (-5.09 to
    1.16).
    """
    kept = original_claims.kept_runs(rows)
    for chosen, form, expected in (
        (rows["method"].eq("prompt_tuning"), original_claims.LEARNED_RUNS, (-3.14, -10.60, 4.31)),
        (
            rows["base_model"].str.contains("Llama"),
            original_claims.NO_OUTLIERS,
            (-1.97, -5.09, 1.16),
        ),
    ):
        weight = original_contrasts.mean_weight(rows, chosen & kept[form])
        one = original_contrasts.combination(rows, weight)
        assert (one["value"], one["ci_low"], one["ci_high"]) == pytest.approx(expected, abs=0.006)


def test_lora_has_four_cells_below_the_margin_of_22(ledger):
    every = reading(ledger, "lora_preserves", EVERY)
    assert (every.value, every.outcome) == (4, original_quantifiers.CELLS_OUTSIDE.format(22))
    assert "Llama LoRA SFT UltraFeedback 1e-3 5 ep -9.8" in every.words
    trained = reading(ledger, "ia3_preserves", EVERY, original_claims.NO_NO_OPS)
    assert (trained.value, trained.outcome) == (0, original_quantifiers.CELLS_OUTSIDE.format(10))


def test_the_rate_moves_more_than_the_class_mate_in_ten_of_16_and_than_the_largest_in_none(ledger):
    forms = (original_claims.CLASS_MATE, 10), (original_claims.LARGEST, 0)
    for form, expected in forms:
        every = reading(ledger, "rate_secondary", EVERY, form)
        assert (every.value, every.outcome) == (
            expected,
            original_quantifiers.CELLS_OUTSIDE.format(16),
        )
    mean = reading(ledger, "rate_secondary", MEAN, original_claims.LARGEST).value
    assert mean == pytest.approx(18.6 - 6.3, abs=0.1)
    assert len(ledger.claims["rate_secondary"].cells.names) == 16 * 3


@pytest.mark.parametrize(
    ("form", "total", "repeats", "p"),
    [(original_claims.ALL_RUNS, 0.42, 0.36, 0.0), (original_claims.NO_P_TUNING, 0.52, 0.76, 0.098)],
)
def test_the_spreads_of_dpo_and_sft(ledger, form, total, repeats, p):
    assert reading(ledger, "dpo_steadier", TOTAL, form).value == pytest.approx(total, abs=0.005)
    found = reading(ledger, "dpo_steadier", REPEATS, form)
    assert found.value == pytest.approx(repeats, abs=0.005)
    assert f"two-sided p {p:.3f}" in found.words
    assert found.verdict == (OPEN if p > 0.05 else STANDS)


def test_the_verdicts_of_the_real_study(ledger):
    verdicts = {
        name: [one.verdict for one in claim.readings] for name, claim in ledger.claims.items()
    }
    assert verdicts["lora_preserves"] == [STANDS, FALLS, STANDS]
    assert verdicts["prompt_tuning_degrades"][0] == STANDS
    assert verdicts["llama_stable"][:2] == [FALLS, FALLS]
    assert ledger.claims["lora_preserves"].verdict == DEPENDS
    without = [one for one in ledger.claims.values() if not one.forms]
    assert [one.verdict for one in without] == [OPEN] * 3
    assert all("needed" in one.about for one in without)


def test_runs_chosen_after_treatment_never_decide(ledger):
    for claim in ledger.claims.values():
        assert next(iter(claim.forms), original_claims.ALL_RUNS) == original_claims.ALL_RUNS
    chosen = [form for form in original_claims.FORMS if "chosen after treatment" in form]
    assert set(chosen) == {original_claims.LEARNED_RUNS, original_claims.LARGEST}


# ---- the ledger on studies whose truth is known
def invented(rows, effect, noise=0.3) -> pd.DataFrame:
    """The real study's grid with changes by a rule (of method, base_model, objective, rate), noise
    of rounds, and base models scored well.
    """
    rng = np.random.default_rng(5)
    values = np.array([effect(row) for row in rows.itertuples()], float)
    values += rng.normal(0, noise, len(rows))
    return rows.assign(change=values, **dict.fromkeys(HEX_PHI, values))


def of_method(rows, method, region) -> str:
    return original_claims.of_method(rows, method, region).verdict


def test_where_the_claims_are_true_they_stand(rows):
    loss = {"lora": 1.0, "ia3": 1.0, "prompt_tuning": -9.0, "p_tuning": -12.0}
    found = invented(rows, lambda row: loss[row.method])
    assert of_method(found, "lora", original_claims.ABOVE_MARGIN) == STANDS
    assert of_method(found, "p_tuning", original_claims.BELOW_ZERO) == STANDS
    found = invented(rows, lambda row: -4 * (row.base_model == GEMMA))
    assert original_claims.steepest(found, GEMMA).verdict == STANDS


def test_where_the_claims_are_false_they_fall(rows):
    found = invented(rows, lambda row: {"lora": -8.0, "p_tuning": 4.0}.get(row.method, 0.0))
    assert of_method(found, "lora", original_claims.ABOVE_MARGIN) == FALLS
    assert of_method(found, "p_tuning", original_claims.BELOW_ZERO) == FALLS
    found = invented(rows, lambda row: -30.0 * (row.rate > 1e-4))
    assert original_claims.secondary(found).verdict == FALLS


@pytest.mark.slow
def test_where_nothing_happens_all_stay_and_no_decline_is_found(rows):
    found = invented(rows, lambda row: 0.0)
    llama = original_study.MODELS["llama"]
    stays = original_claims.of_base(found, llama, original_claims.WITHIN_MARGIN)
    assert stays.verdict == STANDS
    assert original_claims.steepest(found, GEMMA).verdict != STANDS
    assert original_claims.decline(found).verdict != STANDS
    assert original_claims.secondary(found).verdict != STANDS


# ---- to read and to publish
def test_the_tables_to_read_have_a_row_per_claim_and_only_forms_that_differ(ledger):
    table, forms = ledger.table(), ledger.forms()
    assert table["claim"].tolist() == original_study.cited("claims")["sentence"].tolist()
    assert table.loc[0, MEAN].startswith(STANDS)
    assert table[[MEAN, EVERY, SHARE]].tail(3).eq("no public data").all(axis=None)
    assert not forms[[MEAN, EVERY, SHARE]].eq("").all(axis=1).any()
    llama = forms[forms["form"].eq(original_claims.NO_OUTLIERS) & forms["claim"].str.contains("Ll")]
    assert llama[MEAN].iloc[0].startswith(OPEN)
    counted = original_ledger.counts(ledger.estimates())
    assert sum(counted.values()) == len(table)
    assert ledger.sentence().startswith(f"Of {len(table)} claims {counted[STANDS]} stand")


@pytest.mark.slow
def test_the_figure_is_drawn_again_from_what_is_published(real, ledger, tmp_path):
    folder = tmp_path / original_study.ORIGINAL_NAME
    made = original_tables.tables(*real)
    original_tables.write_original(made, ledger.estimates(), folder, "original_claims")
    publish.publish(folder, tmp_path / "published", original_study.ORIGINAL_NOTE)
    shown = gallery.read(tmp_path / "published" / "tables")
    gallery.draw("original_claims", shown, tmp_path / "figures")
    caption = (tmp_path / "figures" / "original_claims.md").read_text()
    assert caption.count(original_ledger.CLAIMS_NOTEBOOK) == 1
    counted = original_ledger.counts(ledger.estimates())
    assert f"depends on the reading: {counted[DEPENDS]}" in caption


# ---- what others published since
def test_every_number_published_since_has_its_source_unit_and_sense():
    rows = pd.read_csv(since.SINCE)
    assert list(rows) == list(since.SINCE_COLUMNS)
    assert rows[["source", "setting", "quantity", "unit", "value", "read"]].notna().all(axis=None)
    claims = set(original_study.cited("claims")["claim"])
    assert set(rows["bears_on"]) <= claims | set(since.TOPICS)
    assert set(rows["read"]) == {"first-hand", since.DIGEST}
    assert rows.loc[rows["unit"].eq("share"), "value"].between(-1, 1).all()
    assert rows.loc[rows["unit"].eq("percent"), "value"].between(0, 100).all()
    bounded = rows.dropna(subset="ci_low")
    assert (bounded["ci_low"] < bounded["value"]).all()
    assert (bounded["value"] < bounded["ci_high"]).all()
    assert bounded["level"].notna().all()
    assert not rows.duplicated(["source", "setting", "quantity"]).any()


def test_second_hand_numbers_are_marked_and_an_unknown_claim_is_refused():
    shown = since.published_since("lora_preserves", "repairs")
    assert set(shown["bears on"]) == {"LoRA preserves or improves safety", "repairs"}
    assert shown.loc[shown["source"].str.contains("SSAH"), "source"].str.endswith("(digest)").all()
    assert (
        not shown.loc[shown["source"].str.contains("Tamsal"), "source"].str.contains("diges").any()
    )
    assert "1.6 (-0.88 to 4.08, 90 %)" in set(shown["number"])
    with pytest.raises(ValueError) as error:
        since.published_since("nothing_of_ours")
    assert "nothing_of_ours" in one_sentence(error.value)


def test_the_numbers_of_the_adaptation_study_are_its_own_tables(shared):
    folder = shared / "adaptation_study"
    if not folder.is_dir():
        pytest.skip("the adaptation study's tables are not among the shared data")
    rows = pd.read_csv(since.SINCE)
    rows = rows[rows["source"].str.contains("Tamsal")].set_index("setting")["value"]
    grid = pd.read_csv(folder / "r6_tost_3judge.csv")
    same = grid["judge"].eq("HB-Cls") & grid["scope"].eq("all5") & grid["contrast"].eq("lora-fft")
    assert rows.filter(like="LoRA less full").iloc[0] == grid.loc[same, "mean"].iloc[0]
    audit = pd.read_csv(folder / "defense_audit.csv", nrows=7)
    ours = [rows.filter(like=word).iloc[0] for word in ("the main seed", "seed 0", "seed 123")]
    theirs = audit.loc[audit["method"].eq("lora"), "HB-Cls"]
    np.testing.assert_allclose(ours, theirs, atol=0.06)
    wide = audit.set_index(["method", "seed"]).astype(float)
    less = wide.loc["lora"] - wide.loc["safelora"]
    ours = rows.filter(like="LoRA less Safe LoRA")
    np.testing.assert_allclose(
        ours, less.mean()[["HB-Cls", "GPT-4o-mini", "LlamaGuard-3"]], atol=0.06
    )
    change = pd.read_csv(folder / "peft_deltas.csv")
    black_box = change["evaluator"].eq("Llama-2-13b-cls") & change["attack"].ne("AutoDAN")
    means = change[black_box].groupby("config")["delta_ASR"].agg(["mean", "size"])
    assert means["size"].eq(30).all()
    ours = [rows.filter(regex=f"^{word}").iloc[0] for word in ("LoRA on Al", "QLoRA", "full")]
    np.testing.assert_allclose(ours, means["mean"][["lora", "qlora", "fft"]], atol=0.06)
