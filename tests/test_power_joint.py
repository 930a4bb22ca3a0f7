"""The power of the joint test against the non-central t, products of independent powers, and a slow
loop of Holm's method.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import nct, norm
from scipy.stats import t as student

from driftbook.analyses import planning, power_joint
from driftbook.stats import estimation, influence, noninferiority, terms
from driftbook.study import study_file

CLOSE = 4 * np.sqrt(0.25 / power_joint.DRAWS)  # four standard errors of a share at most


@pytest.mark.parametrize(("se", "df"), [(1.0, 8.0), (1.5, 30.0), (0.7, 3.0)])
def test_one_outcome_of_one_cell_has_the_power_of_a_t_test(se, df):
    rng = np.random.default_rng(1)
    (found,) = power_joint.drawn(rng, np.array([se]), np.array([df]), np.array([0]), 3.0)
    exact = nct.sf(student.ppf(0.975, df), df, 3.0 / se)
    assert found == pytest.approx(exact, abs=CLOSE)


def test_jointly_the_powers_of_independent_outcomes_multiply():
    se, df, cell = np.array([1.0, 1.2, 0.9]), np.full(3, 20.0), np.zeros(3, int)
    (found,) = power_joint.drawn(np.random.default_rng(2), se, df, cell, 3.0)
    each = nct.sf(student.ppf(0.975, df), df, 3.0 / se)
    assert found == pytest.approx(each.prod(), abs=CLOSE)
    assert found < each.min() - CLOSE  # what the power of one outcome promises


def test_outcomes_that_err_alike_are_shown_together():
    se, df, cell = np.array([1.0, 1.2, 0.9]), np.full(3, 1e6), np.zeros(3, int)
    alike, rng = np.ones((3, 3)), np.random.default_rng(6)
    (found,) = power_joint.drawn(rng, se, df, cell, 3.0, related=alike)
    weakest = norm.cdf(3.0 / 1.2 - norm.ppf(0.975))
    assert found == pytest.approx(weakest, abs=CLOSE)


def a_pilot(rng, runs=4, n=150) -> tuple[power_joint.Pilot, pd.DataFrame]:
    """Two methods on one base model: its answers and prompts are shared by both, each run is alike
    in both outcomes."""
    ids = ["base", *(f"{method}{i}" for method in ("lora", "ia3") for i in range(runs))]
    run = np.append(0.0, 0.5 * rng.normal(size=2 * runs))
    arms = pd.DataFrame({"run_id": ids[1:], "base_run_id": "base", "arm": "x"})
    measured = {}
    for outcome in (terms.UNSAFE, terms.CORRECT):
        noise = rng.normal(size=n) + 0.6 * rng.normal(size=(len(ids), n))
        verdicts = (run[:, None] + noise > 0).astype(float)
        kept = pd.DataFrame(verdicts, ids, pd.MultiIndex.from_product([[outcome], range(n)]))
        measured[outcome] = (None, influence.paired(kept, arms))
    method = np.repeat(["lora", "ia3"], runs)
    cells = arms[["run_id"]].assign(base_model="b", pool="b", setting="s", method=method)
    cells = cells.assign(group="g", member="all", cluster=ids[1:], weight=1 / runs)
    rows = [
        {"base_model": "b", "method": method, "outcome": outcome, "benchmark": benchmark}
        for method in ("lora", "ia3")
        for outcome, benchmark in ((terms.UNSAFE, "safety"), (terms.CORRECT, "utility"))
    ]
    return power_joint.Pilot(measured, cells), pd.DataFrame(rows)


def test_the_pilots_correlation_is_that_of_studies_drawn_again():
    rng, values, said = np.random.default_rng(7), [], []
    for _ in range(300):
        pilot, rows = a_pilot(rng)
        means = [
            change.value.reshape(2, -1).mean(1) for _, change in pilot.measured.values()
        ]  # [outcomes, methods]
        values.append(np.array(means).T.ravel())
        said.append(pilot.correlation(rows, "g"))
    assert np.diag(said[0]) == pytest.approx(1)
    assert np.linalg.eigvalsh(said[0]).min() > -1e-9
    true = np.corrcoef(np.array(values).T)
    assert true[0, 1] > 0.5  # two outcomes of the same runs
    assert np.mean(said, axis=0) == pytest.approx(true, abs=0.17)


def test_holms_step_is_that_of_a_slow_loop():
    se, df, cell = np.array([1.0, 1.1, 1.6, 0.8]), np.full(4, 1e6), np.arange(4)
    found = power_joint.drawn(np.random.default_rng(3), se, df, cell, 3.0)
    rng, shown = np.random.default_rng(4), np.zeros(4)
    for _ in range(4_000):
        p = norm.cdf((se * rng.normal(size=4) - 3.0) / se)
        for step, one in enumerate(p.argsort()):
            if p[one] >= 0.025 / (4 - step):
                break
            shown[one] += 1
    assert found == pytest.approx(shown / 4_000, abs=1.5 * CLOSE)
    alone = power_joint.drawn(np.random.default_rng(3), se, df, cell, 3.0, holm=False)
    assert (found < alone).all()


def test_an_unknown_error_has_no_power_and_costs_the_others_theirs():
    se, df, cell = np.array([1.0, np.nan]), np.array([1e6, np.nan]), np.array([0, 1])
    known, unknown = power_joint.drawn(np.random.default_rng(5), se, df, cell, 3.0)
    assert np.isnan(unknown)
    assert known == pytest.approx(norm.cdf(3.0 - norm.ppf(1 - 0.025 / 2)), abs=CLOSE)


@pytest.fixture
def estimates():
    """Changes of two methods in the three outcomes of the miniature's family, t at 20 df."""
    rows = [
        {"outcome": outcome, "benchmark": benchmark, "method": method, "value": 0.5, "se": se}
        for method, se in (("lora", 0.8), ("ia3", 1.0))
        for outcome, benchmark in noninferiority.HARMS
    ]
    frame = pd.DataFrame(rows).assign(study="miniature", notebook="09_safety", base_model="all")
    half = frame["se"] * student.ppf(0.975, 20)
    frame = frame.assign(ci_low=frame["value"] - half, ci_high=frame["value"] + half)
    judge = np.where(frame["outcome"].eq(terms.UNSAFE), "mini-guard", "none")
    same = {"group": terms.AS_CONFIGURED, "contrast": terms.CHANGE, "population": terms.BOTH}
    return estimation.complete(frame.assign(judge=judge, how="made", **same))


def test_a_declared_family_gets_the_power_of_its_cells(estimates):
    study = study_file.load("miniature")
    found = power_joint.joint_power(study, estimates, 0, notebook="16_power")
    assert found["member"].unique().tolist() == ["preserves"]  # the others have no estimates
    se = found["method"].map({"lora": 0.8, "ia3": 1.0}).repeat(3).to_numpy()
    cell, df = np.repeat([0, 1], 3), np.full(6, 20.0)
    drawn = power_joint.drawn(np.random.default_rng(9), se, df, cell, 3.0)
    assert found["value"].to_numpy(float) / 100 == pytest.approx(drawn, abs=1.5 * CLOSE)
    wide = planning.Grid.jointly(found)
    assert wide.loc[("preserves", 3.0, "ia3"), "all"] < wide.loc[("preserves", 3.0, "lora"), "all"]


def test_at_the_margin_it_says_so_no_more_often_than_its_level(estimates):
    study = study_file.load("miniature")
    found = power_joint.joint_power(study, estimates, 0, harm=3.0, notebook="16_power")
    assert (found["value"] <= 2.5).all()


def test_an_outcome_that_was_not_measured_leaves_no_power(estimates):
    study = study_file.load("miniature")
    some = estimates[estimates["outcome"].ne(terms.CORRECT)]
    found = power_joint.joint_power(study, some, 0, notebook="16_power")
    assert len(found) == 2
    assert found["value"].isna().all()
    assert power_joint.joint_power(study, some.iloc[:0], 0, notebook="16_power").empty
