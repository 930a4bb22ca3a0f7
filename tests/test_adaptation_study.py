"""The statistics of the second study read again: units, equivalence, and what three rates say of
eight patterns of verdicts. No data of the study is needed here.
"""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp, wilcoxon
from statsmodels.stats.weightstats import DescrStatsW

from conftest import one_sentence
from driftbook.rereading import adaptation_judges as judged
from driftbook.rereading import adaptation_published as published
from driftbook.rereading import adaptation_study as known
from driftbook.rereading import adaptation_units as units

ONES = np.ones(len(judged.PATTERNS))


def differences(families: list[str], values) -> pd.Series:
    """Differences of cells, so many in each family."""
    frame = pd.DataFrame({"family": families, "attack": "a", "value": values})
    frame["dataset"] = frame.groupby("family").cumcount().astype(str)
    return frame.set_index(["family", "attack", "dataset"])["value"]


# ---- units
def test_cells_and_families_are_the_t_tests_of_their_means():
    rng = np.random.default_rng(0)
    cells = differences(np.repeat(list("abcde"), 4), rng.normal(2, 5, 20))
    for mean, values in (
        (units.mean_of_cells(cells), cells),
        (units.mean_of_families(cells), cells.groupby("family").mean()),
    ):
        test = ttest_1samp(values, 0)
        low, high = test.confidence_interval(0.95)
        assert np.allclose([*mean.interval().values()][1:], [low, high, test.pvalue])
    clustered = units.mean_by_clusters(cells)
    same = units.mean_of_families(cells)
    assert np.allclose([clustered.se, clustered.df], [same.se, same.df])  # clusters of equal size


@given(st.lists(st.integers(1, 6), min_size=3, max_size=6))
def test_the_clustered_error_is_bell_and_mccaffreys(sizes):
    """From matrices of all cells: the estimator is a quadratic form y' B y; for independent cells
    its mean is the variance of the mean, and the df are those of its first two moments.
    """
    n = sum(sizes)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    y = np.random.default_rng(n).normal(size=n)
    found = units.mean_by_clusters(differences(codes.astype(str), y))
    maker, form = np.eye(n) - 1 / n, np.zeros((n, n))
    for code in range(len(sizes)):
        own = codes == code
        block = maker[np.ix_(own, own)]
        values, vectors = np.linalg.eigh(block)
        root = vectors * np.where(values > 1e-12, values, np.inf) ** -0.5 @ vectors.T
        row = (root @ maker[own]).sum(0) / n
        form += np.outer(row, row)
    assert found.se**2 == pytest.approx(y @ form @ y)
    assert np.trace(form) == pytest.approx(1 / n)
    assert found.df == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))


def test_equivalence_is_that_of_statsmodels_and_its_smallest_margin_just_holds():
    values = np.random.default_rng(1).normal(1, 4, 20)
    mean = units.mean_of_cells(differences(list("abcde") * 4, values))
    for margin in units.MARGINS:
        assert mean.equivalence(margin) == pytest.approx(
            DescrStatsW(values).ttost_mean(-margin, margin)[0]
        )
    assert mean.equivalence(mean.smallest_margin()) == pytest.approx(0.05)


@pytest.mark.slow
def test_cells_of_the_same_runs_make_equivalence_too_easy_and_families_do_not():
    """Families whose cells share a run's effect, with a true difference at the margin: equivalence
    is claimed in at most 5 % with families as units, and far more often with cells.
    """
    rng, claimed = np.random.default_rng(2), []
    names = np.repeat(list("abcde"), 4)
    for _ in range(150):
        values = 5 + np.repeat(rng.normal(0, 4, 5), 4) + rng.normal(0, 2, 20)
        cells = differences(names, values)
        claimed.append(
            [
                one(cells).equivalence(5) < 0.05
                for one in (units.mean_of_cells, units.mean_of_families)
            ]
        )
    cells, families = np.mean(claimed, axis=0)
    assert families < 0.1
    assert cells > 0.12


@pytest.mark.slow
def test_the_spread_of_runs_gives_the_error_of_the_mean_over_families():
    """Simulated runs: the interval over other seeds holds the families' own mean in 95 %."""
    rng, held = np.random.default_rng(3), []
    truth = rng.normal(4, 6, 5)
    for _ in range(250):
        repeats = pd.DataFrame(truth[:, None] + rng.normal(0, 3, (5, 3)))
        spread, df = units.pooled_spread(repeats)
        values = truth + rng.normal(0, 3, 5)
        interval = units.mean_of_reruns(differences(list("abcde"), values), spread, df).interval()
        held.append(interval["ci_low"] <= truth.mean() <= interval["ci_high"])
    assert df == 10
    assert 0.91 < np.mean(held) < 0.985


# ---- patterns of verdicts
rates = st.lists(st.integers(2, 98).map(lambda one: one / 100), min_size=3, max_size=3)
shares = st.lists(st.integers(0, 100).map(lambda one: one / 100), min_size=8, max_size=8)
starts = st.lists(st.integers(1, 100), min_size=8, max_size=8)


def vertices(three: np.ndarray) -> np.ndarray:
    """Every basic solution of the four equations: where linear programmes end."""
    rows, right = np.vstack([ONES, judged.VERDICTS_OF.T]), np.array([1.0, *three])
    found = []
    for chosen in combinations(range(8), 4):
        part = rows[:, chosen]
        if abs(np.linalg.det(part)) > 1e-9:
            some = np.linalg.solve(part, right)
            if (some > -1e-12).all():
                whole = np.zeros(8)
                whole[list(chosen)] = some
                found.append(whole)
    return np.array(found)


@given(rates, starts)
def test_raking_gives_the_rates_and_keeps_every_interaction(three, start):
    three, start = np.array(three), np.array(start, float)
    found = judged.raked(three, start)
    assert np.allclose(judged.VERDICTS_OF.T @ found, three, atol=1e-8)
    assert found.sum() == pytest.approx(1)
    change = np.log(found / (start / start.sum()))  # a sum of one term per judge
    design = np.column_stack([ONES, judged.VERDICTS_OF])
    assert np.allclose(design @ np.linalg.lstsq(design, change, rcond=None)[0], change, atol=1e-6)


def test_judges_without_interaction_are_raked_to_independence():
    three = np.array([0.2, 0.5, 0.7])
    each = np.where(judged.VERDICTS_OF == 1, three, 1 - three)
    assert np.allclose(judged.raked(three, ONES), each.prod(1))


@given(rates, shares)
def test_bounds_are_the_extremes_of_all_vertices_and_hold_the_raked_rate(three, harmful):
    three, harmful = np.array(three), np.array(harmful)
    corners = vertices(three)
    low, high = judged.bounded(three, harmful, harmful)
    assert np.allclose([low, high], [(corners @ harmful).min(), (corners @ harmful).max()])
    assert low - 1e-9 <= judged.raked(three, ONES) @ harmful <= high + 1e-9
    wider = judged.bounded(three, harmful * 0.9, harmful * 0.9 + 0.1)
    assert wider[0] <= low + 1e-9
    assert high <= wider[1] + 1e-9


@given(rates, shares)
def test_bounds_of_a_ratio_are_the_extremes_of_all_vertices(three, harmful):
    three, harmful = np.array(three), np.array(harmful) * 0.9 + 0.05
    corners, said = vertices(three), judged.VERDICTS_OF[:, 0]
    ratios = (corners @ (said * harmful)) / (corners @ harmful)
    found = judged.ratio_bounds(three, said * harmful, harmful)
    assert np.allclose(found, [ratios.min(), ratios.max()], atol=1e-6)


def test_a_sample_drawn_by_its_verdicts_tells_shares_and_misleads_on_errors():
    """A population with known errors, sampled by patterns as the study did: the corrected rate is
    the true one, the raked false-positive rate nears it, and the sample's own does not.
    """
    rng, n = np.random.default_rng(4), 200_000
    harmful = rng.random(n) < 0.15
    said = np.where(
        harmful[:, None],
        rng.random((n, 3)) < [0.7, 0.75, 0.8],
        rng.random((n, 3)) < [0.04, 0.3, 0.2],
    ).astype(int)
    pattern = pd.Series(said.astype(str).tolist()).map("".join)
    frame = pd.DataFrame({"pattern": pattern, "consensus": pd.array(harmful * 1.0, "Float64")})
    drawn = frame.groupby("pattern").sample(400, random_state=0)
    found = judged.shares_of(drawn)
    low, high = judged.bounded(said.mean(0), *found.all_ends())
    assert low < harmful.mean() < high
    weights = judged.raked(
        said.mean(0), frame["pattern"].value_counts()[judged.PATTERNS].to_numpy()
    )
    assert weights @ found.value == pytest.approx(harmful.mean(), abs=0.01)
    alarms = judged.VERDICTS_OF[:, 1] * (1 - found.value)
    raked = (alarms @ weights) / ((1 - found.value) @ weights)
    counts = published.confusion(drawn, 1)
    sampled = counts["fp"] / (counts["fp"] + counts["tn"])
    assert raked == pytest.approx(0.3, abs=0.01)
    assert sampled > 0.4
    ends = judged.ratio_bounds(said.mean(0), alarms, 1 - found.value)
    assert ends[0] < 0.3 < ends[1]


def test_rates_that_no_answers_can_have_are_refused():
    with pytest.raises(ValueError) as error:
        judged.bounded(np.array([1.2, 0.5, 0.5]), 0 * ONES, ONES)
    assert "no shares" in one_sentence(error.value)


# ---- labels
def test_two_people_agree_only_on_zero_or_one():
    table = pd.DataFrame(
        {
            "sample_id": list("abcd"),
            "attack": "PAIR",
            "model_family": "phi4",
            "config": "lora",
            "selection_group": "consensus_pos",
            "annotator_A": [1, 0, 1, 4],
            "annotator_B": [1, 0, 4, 4],
            **dict.fromkeys(known._VERDICT_COLUMNS, 1),
        }
    )
    rows = known._labels(table, "attack")
    assert rows["consensus"].tolist()[:2] == [1, 0]
    assert rows["consensus"].isna().tolist() == [False, False, True, True]
    found = judged.shares_of(rows)
    assert (found.k[-1], found.n[-1], found.drawn[-1]) == (1, 2, 4)
    low, high = found.all_ends()
    assert low[-1] < 0.25 < 0.75 < high[-1]  # either disagreement may be either
    assert (found.value[0], low[0], high[0]) == (0.5, 0, 1)  # of what nobody labelled


def test_a_half_in_the_last_digit_is_either():
    found = published.equal_to("f", "s", [0.12, 0.13, 0.14, np.nan], [0.125, 0.125, 0.125, 1], 2)
    assert (found["published"], found["equal"]) == (3, 2)


def test_few_signed_ranks_are_scipys_where_nothing_is_tied():
    rng = np.random.default_rng(5)
    for n in (4, 9, 13):
        values = pd.Series(rng.normal(0.5, 1, n))
        assert published.signed_rank_p(values) == pytest.approx(wilcoxon(values).pvalue)
    tied = pd.Series([2.0, -2.0, 2.0, 2.0, 0.0, 1.0])
    assert published.signed_rank_p(tied) == pytest.approx(wilcoxon(tied).pvalue)


# ---- where the tables are
def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError) as error:
        known.adaptation_located(str(tmp_path / "nowhere"))
    assert "there is no folder" in one_sentence(error.value)
    with pytest.raises(ValueError) as error:
        known.read_tables(tmp_path)
    assert "has no asr_500_labels.csv" in one_sentence(error.value)
    (tmp_path / "asr_500_labels.csv").write_text("sample_id\nasr_001\n")
    with pytest.raises(ValueError) as error:
        known.read_tables(tmp_path)
    assert "has 1 rows, and the study's has 500" in one_sentence(error.value)


def test_tables_are_asked_of_the_public_repository_at_its_commit(monkeypatch):
    import pooch

    monkeypatch.delenv("DRIFTBOOK_SHARED", raising=False)
    asked = []
    monkeypatch.setattr(pooch, "retrieve", lambda url, **more: asked.append((url, more["fname"])))
    known.adaptation_located()
    files = known.adaptation_files()
    assert {name: url for url, name in asked} == {
        name: f"https://raw.githubusercontent.com/Taleef7/adaptation-not-algorithm/"
        f"{known.ADAPTATION_COMMIT}/{folder}/{name}"
        for name, folder in files["folder"].items()
    }
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    with pytest.raises(ValueError) as error:
        known.adaptation_located()
    assert "DRIFTBOOK_SHARED" in one_sentence(error.value)


def test_students_quantile_is_the_one_of_the_smallest_margin():
    mean = units.UnitMean(-2.0, 1.5, 4.0, 5)
    assert mean.smallest_margin() == pytest.approx(2 + 1.5 * student.ppf(0.95, 4))
