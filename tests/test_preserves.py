""" "Preserves" is a joint decision below a margin, and what bad input says."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from comparing import LABELS, draw, made
from driftbook.stats import comparisons, estimation, influence, noninferiority, terms


# ---- preserves
def changed(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    """Changes (outcome, benchmark, value, se) of one method with t intervals of 10 df."""
    half = scipy_stats.t.ppf(0.975, 10)
    made = [
        {
            **LABELS,
            "outcome": o,
            "benchmark": b,
            "value": v,
            "se": se,
            "ci_low": v - half * se,
            "ci_high": v + half * se,
        }
        for o, b, v, se in rows
    ]
    same = {
        "base_model": "all",
        "method": "lora",
        "group": terms.AS_CONFIGURED,
        "contrast": terms.CHANGE,
        "population": "p",
        "how": "h",
    }
    return estimation.complete(
        pd.DataFrame(made).assign(**same, n_runs=12, n_items=100, n_unscored=0)
    )


SAFE, REFUSED, CORRECT = (
    (terms.UNSAFE, "safety"),
    (terms.REFUSED, "over_refusal"),
    (terms.CORRECT, "utility"),
)


@pytest.mark.parametrize(
    ("unsafe", "refused", "correct", "word"),
    [
        ((0.5, 0.5), (0.0, 0.5), (-1.0, 0.5), noninferiority.PRESERVES),
        ((0.5, 0.5), (0.0, 0.5), (-1.0, 3.0), noninferiority.CANNOT_TELL),
        ((0.5, 0.5), (9.0, 1.0), (-1.0, 3.0), noninferiority.DOES_NOT),
        (
            (0.5, 0.5),
            (-9.0, 1.0),
            (9.0, 1.0),
            noninferiority.PRESERVES,
        ),  # fewer refusals and more right answers are no harm
        ((0.5, 0.5), (0.0, 0.5), (-9.0, 1.0), noninferiority.DOES_NOT),
    ],
)
def test_preserves_is_all_outcomes_below_the_margin(unsafe, refused, correct, word):
    found = noninferiority.preserves(
        changed((*SAFE, *unsafe), (*REFUSED, *refused), (*CORRECT, *correct)), notebook="19"
    )
    joint = found[found["outcome"].eq(noninferiority.JOINTLY)].set_index("margin").loc[3.0]
    single = found[found["outcome"].ne(noninferiority.JOINTLY) & found["margin"].eq(3.0)]
    assert joint["how"].startswith(word + ":")
    assert joint["p"] == single["p"].max()
    assert found["notebook"].eq("19").all()
    for row, (value, se) in zip(
        single.itertuples(), (unsafe, refused, (-correct[0], correct[1])), strict=True
    ):
        assert row.p == pytest.approx(scipy_stats.t.cdf((value - 3.0) / se, 10), rel=1e-6)
        assert (row.p < 0.025) == row.how.startswith(noninferiority.PRESERVES)


def test_without_utility_in_points_nothing_is_preserved_jointly():
    rows = changed((*SAFE, 0.5, 0.5), (*REFUSED, 0.0, 0.5), (terms.LOSS, "utility", 0.0, 0.1))
    joint = noninferiority.preserves(rows).query("outcome == @noninferiority.JOINTLY").iloc[0]
    assert joint["how"].startswith(noninferiority.CANNOT_TELL)
    assert "no margin in points" in joint["how"]
    assert pd.isna(joint["p"])
    assert noninferiority.preserves(rows.head(0)).empty


def test_nothing_moved_is_tested_exactly():
    verdicts = np.zeros((4, 400))
    verdicts[:, :40] = 1
    values, arms, cells = made(verdicts, ["lora"] * 3, ["a"] * 3)
    rows = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS)
    row = noninferiority.preserves(rows, (1.0,), [SAFE]).iloc[0]
    assert row["p"] == pytest.approx(scipy_stats.binom.pmf(0, 400, 0.01))
    assert row["how"].startswith(noninferiority.PRESERVES)


def on_bases(n: int, value: float, se: float) -> pd.DataFrame:
    """The same change on each of n base models."""
    one = changed((*SAFE, value, se))
    return pd.concat([one.assign(base_model=f"b{i}") for i in range(n)], ignore_index=True)


def test_words_are_decided_over_their_whole_family():
    single = noninferiority.preserves(on_bases(1, 0.8, 1.0), (3.0,), [SAFE]).iloc[0]
    assert 0.0125 < single["p"] < 0.05
    assert single["how"].startswith(noninferiority.CANNOT_TELL) == (single["p"] >= 0.025)
    close = on_bases(16, 0.5, 1.0)  # p = .016: shown alone, not among sixteen
    assert (
        noninferiority.preserves(close.head(1), (3.0,), [SAFE])["how"]
        .str.startswith(noninferiority.PRESERVES)
        .any()
    )
    among = noninferiority.preserves(close, (3.0,), [SAFE])
    assert among["how"].str.startswith(noninferiority.CANNOT_TELL).all()


def test_one_seed_gets_a_word_for_its_runs_alone():
    rows = changed((*SAFE, 0.0, 0.3)).assign(population=terms.THESE_RUNS)
    found = noninferiority.preserves(rows, (3.0,), [SAFE])
    said = noninferiority.PRESERVES + noninferiority.IN_THESE_RUNS + ":"
    assert found["how"].str.startswith(said).all()


def test_what_would_overturn_a_word_is_named():
    row = changed((*SAFE, 0.0, 0.5)).assign(n_unscored=300)
    bound = row.assign(contrast=terms.HIGHEST, se=None, ci_low=None, ci_high=None)
    said = {}
    for worst in (0.5, 15.0):
        rows = estimation.complete(pd.concat([row, bound.assign(value=worst)]))
        [said[worst]] = noninferiority.preserves(rows, (3.0,), [SAFE]).query(
            "outcome != @noninferiority.JOINTLY"
        )["how"]
    spare = 3 - scipy_stats.t.ppf(0.975, 10) * 0.5
    assert all(f"{spare:.1f} points more harm" in one for one in said.values())
    assert "all 300 unscored answers together cannot" in said[0.5]
    assert f"{np.ceil(300 * spare / 15):.0f} of its 300 unscored answers" in said[15.0]


# ---- bad input
def test_an_answer_that_stands_twice_is_refused():
    rows = pd.DataFrame(
        {
            "run_id": "r",
            "category": "c",
            "prompt_id": ["1", "1", "2"],
            "sample": [0, 1, 0],
            "unsafe": [True, False, True],
        }
    )
    assert influence.matrix(rows, "unsafe", ["category", "prompt_id"]).iloc[0].tolist() == [
        0.5,
        1.0,
    ]
    with pytest.raises(ValueError, match="1 answers stand twice, the first of run r, prompt 2"):
        influence.matrix(pd.concat([rows, rows.tail(1)]), "unsafe", ["category", "prompt_id"])


def test_one_seed_says_nothing_of_others():
    values, arms, cells = made(draw(9, runs=2), ["lora", "ia3"], ["a", "a"])
    row = comparisons.between(influence.paired(values, arms), cells, **LABELS).iloc[0]
    assert row["population"] == terms.THESE_RUNS.replace("prompts", "families of prompts")
    assert "nothing is known of other seeds" in row["how"]
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_a_run_without_answers_is_no_smaller_cell():
    values, arms, cells = made(draw(10, runs=6), ["lora"] * 3 + ["ia3"] * 3, ["a"] * 6)
    lost = influence.paired(values.drop(index="r2"), arms)
    rows = estimation.means(lost, cells, terms.CHANGE, **LABELS).set_index(["method", "contrast"])
    assert pd.isna(rows.loc[("lora", terms.CHANGE), "value"])
    assert "1 of 3 runs have no answers" in rows.loc[("lora", terms.CHANGE), "how"]
    assert comparisons.between(lost, cells, **LABELS)["value"].isna().all()
    silent = values.copy()
    silent.loc["r2"] = np.nan
    assert (
        comparisons.between(influence.paired(silent, arms), cells, **LABELS)["how"]
        .str.contains("no scored item")
        .all()
    )
    assert comparisons.odds_ratios(silent, arms, cells, **LABELS)["value"].isna().sum() == 1


def test_runs_that_are_all_equal_are_said_to_be():
    verdicts = draw(11, runs=1)[[0, 1, 1, 1]]
    values, arms, cells = made(verdicts, ["lora"] * 3, ["a"] * 3)
    row = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS).iloc[0]
    assert "equal in every unit" in row["how"]
    assert row["se"] == pytest.approx(
        100 * np.std(verdicts[1] - verdicts[0], ddof=1) / np.sqrt(120)
    )


def test_one_family_of_prompts_says_nothing_of_other_prompts():
    values, arms, cells = made(draw(12, runs=3), ["lora"] * 3, ["a"] * 3, family=["f"] * 120)
    row = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **LABELS).iloc[0]
    assert row["population"] == terms.THESE_PROMPTS
    assert "one unit says nothing of others" in row["how"]
