"""The engine of linear mixed models against the normal density itself, R's lmerTest, and groupings
that are no clean grid; what is too large is refused before memory is taken.
"""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from driftbook.stats import penalised
from driftbook.stats.linear import rate_model
from driftbook.stats.logistic import item_model
from driftbook.stats.penalised import Crossed, Grouping


def crossed(seed: int, n: int = 60, levels: tuple[int, ...] = (12, 5, 4), components: int = 2):
    """A design with a few fixed terms, groupings in which some rows have no level, and theta."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), rng.normal(size=(n, 2))])
    groupings = [
        Grouping(
            rng.integers(-1, k, n), rng.permutation(np.arange(k) % components), np.ones((n, 1))
        )
        for k in levels
    ]
    theta = rng.choice([0.0, 0.3, 1.0, 2.0], sum(one.n_parameters for one in groupings))
    return x, rng.normal(size=n), groupings, theta


def covariance(groupings: list[Grouping], theta: np.ndarray, n: int) -> np.ndarray:
    """Of y / sigma, from Z itself; theta in the order of the groupings."""
    found, start = np.eye(n), 0
    for one in groupings:
        z = one.columns().toarray() * theta[start + one.component]
        found, start = found + z @ z.T, start + one.n_parameters
    return found


@pytest.mark.parametrize("kept_sparse", [0.0, 1.1])
@pytest.mark.parametrize("levels", [(12, 5, 4), (12,), ()])
def test_the_deviance_is_that_of_the_normal_density(levels, kept_sparse, monkeypatch):
    monkeypatch.setattr(penalised, "SPARSE", kept_sparse)
    for seed in range(3):
        x, y, groupings, theta = crossed(seed, levels=levels)
        (q, r), n, p = np.linalg.qr(x), *x.shape
        v = covariance(groupings, theta, n)
        inverse = np.linalg.inv(v)
        b = np.linalg.solve(x.T @ inverse @ x, x.T @ inverse @ y)
        rest = y - x @ b
        for reml in (False, True):
            variance = rest @ inverse @ rest / (n - p * reml)
            loglik = multivariate_normal(x @ b, variance * v).logpdf(y)
            if reml:  # Harville 1974, Biometrika 61, 383, without his term of X'X
                information = x.T @ inverse @ x / variance
                loglik += p * np.log(2 * np.pi) / 2 - np.linalg.slogdet(information)[1] / 2
            model = Crossed(q, y, groupings, reml)
            at = model.at(theta)
            known = np.log(np.abs(np.diag(r))).sum() if reml else 0.0
            assert -model.deviance(at) / 2 - known == pytest.approx(loglik, abs=1e-8)
            assert at.rest == pytest.approx(rest @ inverse @ rest)
            assert np.allclose(at.root @ at.root.T, q.T @ inverse @ q)
            assert np.allclose(at.root @ at.score, q.T @ inverse @ y)


def test_a_slopes_deviance_is_that_of_the_normal_density():
    rng = np.random.default_rng(0)
    n, levels = 50, 8
    effects = np.column_stack([np.ones(n), rng.normal(size=n)])
    one = Grouping(rng.integers(-1, levels, n), np.zeros(levels, int), effects)
    q, y = np.linalg.qr(effects)[0], rng.normal(size=n)
    lower = np.array([[0.7, 0.0], [-0.4, 0.5]])
    z = one.columns().toarray() @ np.kron(np.eye(levels), lower)
    v = np.eye(n) + z @ z.T
    found = Crossed(q, y, [one], reml=True).at(lower[np.tril_indices(2)])
    information = q.T @ np.linalg.solve(v, q)
    assert np.allclose(found.root @ found.root.T, information)
    assert found.log_det == pytest.approx(
        np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1]
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_no_standard_deviations_nearby_are_more_likely(seed):
    x, y, groupings, _ = crossed(seed, components=1)
    model = Crossed(np.linalg.qr(x)[0], y, groupings, reml=True)
    found = penalised.maximum(model)
    best = model.deviance(found.at)
    for i in range(model.n_parameters):
        for other in (0.0, 0.02, 0.98 * found.theta[i], 1.02 * found.theta[i], 1.0):
            there = np.where(np.arange(model.n_parameters) == i, other, found.theta)
            assert model.deviance(model.at(there)) >= best - 1e-6


# ---- degrees of freedom
def test_degrees_of_freedom_are_those_of_lmertest(shared):
    data = pd.read_csv(shared / "reference" / "sim_run_category.csv").astype({"epochs": str})
    theirs = json.loads((shared / "reference" / "run_category.json").read_text())
    fit = rate_model(
        data,
        "rate ~ C(base, levels=['llama', 'qwen', 'mistral', 'gemma'])"
        " * C(method, levels=['lora', 'ia3', 'prompt', 'ptuning'])"
        " + objective + C(lr, levels=['lo', 'hi']) + epochs",
        ("run", "category"),
    )
    found = fit.contrast(np.eye(len(fit.fixed)))["df"]  # of every term, whatever objective is first
    expected = theirs["lmm_run_category"]["coef"]
    df = pd.DataFrame(expected).set_index("name")["df"]
    assert found[1:].to_numpy() == pytest.approx(df.drop("(Intercept)").mean(), rel=2e-4)
    means = pd.MultiIndex.from_product(
        [data[name].unique() for name in ("base", "method", "objective", "lr", "epochs")],
        names=["base", "method", "objective", "lr", "epochs"],
    ).to_frame(index=False)
    emm = theirs["lmm_run_category_contr"]["emm"]
    at = [fit.at(means[means["method"].eq(method)]).mean(0) for method in emm["method"]]
    assert np.allclose(fit.contrast(np.array(at))["df"], emm["df"], rtol=2e-4)


def test_a_variance_of_runs_by_kind_is_lme4s(shared):
    """lmer(... + (0+dummy(objective,"sft")|run) + (0+dummy(objective,"dpo")|run) + (1|category) +
    (1|category:base)), lme4 1.1-31 and lmerTest 3.1-3.
    """
    data = pd.read_csv(shared / "reference" / "sim_run_category.csv").astype({"epochs": str})
    groups = ("run by objective", "category", "category:base")
    fit = rate_model(data, "rate ~ base * method + objective + lr + epochs", groups)
    sd = fit.random.set_index("group")["sd"]
    theirs = [0.058997523, 0.075767011, 0.035490329, 0.024232858, 0.067460923]
    assert np.allclose(sd[["run of sft", "run of dpo", *groups[1:], "residual"]], theirs, rtol=5e-4)
    assert fit.loglik == pytest.approx(2905.13536279, abs=1e-5)
    found = fit.fixed.assign(df=fit.contrast(np.eye(len(fit.fixed)))["df"]).iloc[:4, 1:]
    assert np.allclose(
        found,
        [
            [0.8310000673, 0.0212106470, 95.47957],
            [0.0340633219, 0.0248706693, 197.44531],
            [-0.2384445340, 0.0277249546, 233.27830],
            [-0.0229361287, 0.0229444175, 193.80668],
        ],
        rtol=3e-4,
    )


def test_a_logistic_models_variance_of_runs_by_kind_is_lme4s(shared):
    """glmer with (0+dummy(objective,"sft")|run) + (0+dummy(objective,"dpo")|run) + (1|prompt)."""
    data = pd.read_csv(shared / "reference" / "sim_small_items.csv").astype({"epochs": str})
    formula = "safe ~ base + method + objective + lr + epochs"
    fit = item_model(data, formula, ("run by objective", "prompt"))
    assert fit.random["group"].tolist() == ["run of sft", "run of dpo", "prompt"]
    assert np.allclose(fit.random["sd"], [0.29598108, 0.67159691, 0.90181444], rtol=5e-3)
    assert fit.loglik == pytest.approx(-1242.86520825, abs=0.01)
    assert np.allclose(
        fit.fixed["estimate"][:4], [2.033283, 0.343534, -1.288747, 0.046464], atol=5e-3
    )
    assert fit.fixed["se"][1] == pytest.approx(0.22518998, rel=0.01)
    assert fit.converged
    one = item_model(data.assign(kind="one"), formula, ("run by kind", "prompt"))
    same = item_model(data, formula, ("run", "prompt"))
    assert one.random["group"].tolist() == ["run of one", "prompt"]
    assert one.loglik == pytest.approx(same.loglik, abs=1e-8)


def test_sleepstudys_degrees_of_freedom_are_lmertests(shared):
    data = pd.read_csv(shared / "mixed_models" / "sleepstudy.csv")
    one = rate_model(data, "Reaction ~ Days", ("Subject",)).contrast(np.eye(2))["df"]
    assert np.allclose(one, [22.810199, 161.0], rtol=1e-4)  # lmerTest 3.1-3 with R 4.2.2
    two = rate_model(data, "Reaction ~ Days", ("Days | Subject",)).contrast(np.eye(2))["df"]
    assert np.allclose(two, [16.99973, 16.99998], rtol=1e-4)


def test_balanced_data_have_the_degrees_of_freedom_of_the_analysis_of_variance():
    rng = np.random.default_rng(1)
    rows = pd.DataFrame(
        {"run_id": np.repeat(np.arange(12), 5), "category": np.tile(np.arange(5), 12)}
    )
    rows["method"] = np.where(rows["run_id"] % 2, "lora", "ia3")
    run, category = rng.normal(0, 3, 12), rng.normal(0, 2, 5)
    rows["y"] = run[rows["run_id"]] + category[rows["category"]] + rng.normal(size=len(rows))
    fit = rate_model(rows, "y ~ method")
    assert fit.contrast([[0, 1]])["df"].item() == pytest.approx(10, rel=1e-4)  # runs in methods
    within = rate_model(rows.assign(x=np.tile([0, 1, 2, 3, 4], 12)), "y ~ x", "run_id")
    assert within.contrast([[0, 1]])["df"].item() == pytest.approx(60 - 12 - 1, rel=1e-4)


# ---- groupings
def rows_of(n: int = 240, seed: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"run_id": np.arange(n) // 10, "category": np.arange(n) % 10})
    frame["base_model"] = np.where(frame["run_id"] % 2, "x", "y")
    run, cell = rng.normal(0, 2, 24), rng.normal(0, 2, (2, 10))
    base = frame["base_model"].eq("x").astype(int)
    return frame.assign(
        y=run[frame["run_id"]] + cell[base, frame["category"]] + rng.normal(size=n), one="one"
    )


def test_components_that_part_the_rows_alike_are_one():
    fit = rate_model(
        rows_of().assign(twin=lambda rows: rows["category"].astype(str)),
        "y ~ 1",
        ("run_id", "category", "one:category", "twin"),
    )
    assert fit.random["group"].tolist() == ["run_id", "category", "residual"]
    told = " ".join(fit.notes)
    assert "one:category left out: its levels are those of category" in told
    assert "twin left out: its levels are those of category" in told


def test_joined_columns_and_the_order_of_groups():
    groups = ("category", "base_model:category", "run_id")
    one = rate_model(rows_of(), "y ~ base_model", groups)
    other = rate_model(rows_of(), "y ~ base_model", groups[::-1])
    assert one.random["group"].tolist() == [*groups, "residual"]
    assert one.loglik == pytest.approx(other.loglik, abs=1e-6)
    sd = [fit.random.set_index("group")["sd"] for fit in (one, other)]
    assert np.allclose(sd[0], sd[1][sd[0].index], atol=1e-4)


def test_a_row_whose_group_is_null_has_no_effect_of_it():
    rows = rows_of()
    alone = rows.assign(run_id=rows["run_id"].astype(object).where(rows["run_id"] > 1, None))
    fit, n = rate_model(alone, "y ~ 1", ("run_id", "category")), len(rows)
    sd = fit.random.set_index("group")["sd"]
    v = sd["residual"] ** 2 * np.eye(n)
    for name in ("run_id", "category"):
        z = pd.get_dummies(alone[name]).to_numpy(float)
        v += sd[name] ** 2 * z @ z.T
    inverse = np.linalg.inv(v)
    assert fit.fixed["se"].item() == pytest.approx(inverse.sum() ** -0.5, rel=1e-6)


def test_response_without_noise_between_the_rows_of_a_run_is_no_error():
    rows = rows_of().assign(y=lambda frame: frame["run_id"].astype(float))
    fit = rate_model(rows, "y ~ 1", ("run_id",))
    assert fit.fixed["estimate"].item() == pytest.approx(11.5)


# ---- what is too large, and what is no share
def test_a_model_that_needs_too_much_memory_is_refused_before_it_is_taken():
    n = 60_000
    rows = pd.DataFrame({"y": np.zeros(n), "student": np.arange(n) // 2, "test": np.arange(n) // 3})
    rows["y"] = np.random.default_rng(0).normal(size=n)
    said = "student: 30,000.*20,000 of test.* GB .* limit is 2.0 GB; nothing was fitted"
    with pytest.raises(ValueError, match=said):
        rate_model(rows, "y ~ 1", ("student", "test"))
    rows["school"] = rows["student"] // 12
    said = r"60,000 rows and the 2,500 columns of 'y ~ C\(school\)' .* 4.5 GB"
    with pytest.raises(ValueError, match=said):
        rate_model(rows, "y ~ C(school)", ("test",))
    for formula in ("y ~ C(student)", "y ~ pupil"):
        pupils = rows.assign(pupil=rows["student"].astype(str))
        with pytest.raises(ValueError, match=r"contrasts of the 30,000 levels .* 26.8 GB"):
            rate_model(pupils, formula, ("test",))
    items = rows.assign(safe=rows["y"] > 0, prompt=np.arange(n) // 2, run=np.arange(n) % 30_011)
    with pytest.raises(ValueError, match="30,011 rows of run x 30,000 of prompt"):
        item_model(items, "safe ~ 1", ("run", "prompt"))


def test_responses_that_are_no_shares_are_refused():
    rows = pd.DataFrame({"run_id": np.arange(60) // 6, "prompt_id": np.arange(60) % 6})
    rows["safe"] = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    rows["n"] = 5
    for value, said in ((2.0, "outside 0 to 1"), (-0.5, "outside 0 to 1"), (0.4, "needs trials=")):
        with pytest.raises(ValueError, match=f"1 values of 'safe' .*{said}"):
            item_model(rows.assign(safe=rows["safe"].where(rows.index != 7, value)), "safe ~ 1")
    percent = rows.assign(safe=100 * rows["safe"])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        item_model(percent, "safe ~ 1", trials="n")
    with pytest.raises(ValueError, match="trials='m'"):
        item_model(rows, "safe ~ 1", trials="m")
    with pytest.raises(ValueError, match="1 values of trials='n'"):
        item_model(rows.assign(n=rows["n"].where(rows.index != 7, -1)), "safe ~ 1", trials="n")
    assert item_model(rows.assign(safe=0.4), "safe ~ 1", trials="n").converged
