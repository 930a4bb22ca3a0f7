"""Mixed models against R's lme4 and printed values of other programs, against derivatives by
differences and the integral itself, and on data that cannot be fitted.
"""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from driftbook.analyses import marginal_means, mixed_effects
from driftbook.stats import laplace, logistic
from driftbook.stats.linear import rate_model
from driftbook.stats.logistic import item_model

ORDERS = {
    "base": ["llama", "qwen", "mistral", "gemma"],
    "method": ["lora", "ia3", "prompt", "ptuning"],
    "objective": ["sft", "dpo"],
    "lr": ["lo", "hi"],
}


def reference(shared, name: str) -> pd.DataFrame:
    """A data set of the references with its factors in R's order."""
    frame = pd.read_csv(shared / "reference" / name)
    for column, order in ORDERS.items():
        if column in frame:
            frame[column] = pd.Categorical(frame[column], order)
    return frame.assign(epochs=frame["epochs"].astype(str)) if "epochs" in frame else frame


def fits(shared, name: str) -> dict:
    return json.loads((shared / "reference" / name).read_text())


def r_name(term: str) -> str:
    return "(Intercept)" if term == "Intercept" else term.replace("[T.", "").replace("]", "")


def theirs(fit, result: dict) -> pd.DataFrame:
    return (
        pd.DataFrame(result["coef"])
        .set_index("name")
        .loc[[r_name(term) for term in fit.fixed["term"]]]
    )


# ---- linear, against lme4
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group", "reml"),
    [
        ("slope_REML", "Days | Subject", True),
        ("int_REML", "Subject", True),
        ("slope_ML", "Days | Subject", False),
        ("int_ML", "Subject", False),
    ],
)
def test_sleepstudy_is_lme4s(shared, name, group, reml):
    data = pd.read_csv(shared / "mixed_models" / "sleepstudy.csv")
    fit, result = (
        rate_model(data, "Reaction ~ Days", (group,), reml=reml),
        fits(shared, "classic.json")[f"sleepstudy_{name}"],
    )
    assert np.allclose(fit.fixed["estimate"], theirs(fit, result)["Estimate"], atol=1e-6)
    assert np.allclose(fit.fixed["se"], theirs(fit, result)["Std. Error"], rtol=1e-4)
    assert fit.loglik == pytest.approx(result["logLik"], abs=0.01)
    assert np.allclose(
        fit.random["sd"],
        [
            abs(sd) if term != "correlation" else sd
            for sd, term in zip(_sds(result), fit.random["term"], strict=True)
        ],
        rtol=5e-3,
    )
    assert fit.converged
    assert fit.report["gradient_norm"] < 1e-2


def _sds(result: dict) -> list[float]:
    spread = result["varcorr"]
    of = {
        (one, two): sd
        for one, two, sd in zip(spread["var1"], spread["var2"], spread["sdcor"], strict=True)
    }
    names = [
        key
        for key in (("(Intercept)", None), ("Days", None), ("(Intercept)", "Days"), (None, None))
        if key in of
    ]
    return [of[key] for key in names]


@pytest.mark.slow
def test_the_linear_contrasts_are_those_of_emmeans(shared):
    data = reference(shared, "sim_run_category.csv").assign(rate=lambda rows: 100 * rows["rate"])
    fit, result = (
        rate_model(data, "rate ~ base * method + objective + lr + epochs", ("run", "category")),
        fits(shared, "run_category.json")["lmm_run_category_contr"],
    )
    check_pairs(fit, result["pairs_none"], 100)


def check_pairs(fit, pairs: dict, scale: float = 1.0) -> None:
    """The differences of methods, averaged over the levels of all other factors with equal
    weights.
    """
    rows = pd.MultiIndex.from_product(
        [*ORDERS.values(), ["1", "5"]], names=[*ORDERS, "epochs"]
    ).to_frame(index=False)
    mean = {method: fit.at(rows[rows["method"].eq(method)]).mean(0) for method in ORDERS["method"]}
    for name, estimate, se in zip(pairs["contrast"], pairs["estimate"], pairs["SE"], strict=True):
        one, two = name.split(" - ")
        found = fit.contrast(mean[one] - mean[two]).iloc[0]
        assert found["estimate"] / scale == pytest.approx(
            estimate, abs=0.005 if scale == 1 else 1e-5
        )
        assert found["se"] / scale == pytest.approx(se, rel=0.007 if scale == 1 else 1e-3)


@pytest.mark.slow
def test_runs_of_each_method_have_a_variance_of_their_own():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {"run_id": np.repeat(np.arange(80), 6), "category": np.tile(np.arange(6), 80)}
    ).assign(method=lambda frame: np.where(frame["run_id"] % 2, "lora", "ia3"))
    spread = np.where(np.arange(80) % 2, 8.0, 1.0)
    rows["difference"] = (spread * rng.normal(size=80))[rows["run_id"]] + rng.normal(
        0, 2, len(rows)
    )
    fit = rate_model(rows, "difference ~ method", ("run_id by method", "category"))
    sd = fit.random.set_index("group")["sd"]
    means = rows.groupby(["method", "run_id"])["difference"].mean().groupby("method").std()
    assert sd["run_id of lora"] == pytest.approx(np.sqrt(means["lora"] ** 2 - 4 / 6), rel=0.05)
    assert sd["run_id of ia3"] == pytest.approx(np.sqrt(means["ia3"] ** 2 - 4 / 6), rel=0.3)
    pooled = rate_model(rows, "difference ~ method").random.set_index("group")["sd"]["run_id"]
    assert sd["run_id of ia3"] < pooled < sd["run_id of lora"]


# ---- logistic, against lme4 and other programs
def test_the_crossed_model_is_lme4s(shared):
    data, both = reference(shared, "sim_small_items.csv"), fits(shared, "small_items.json")
    fit, result = (
        item_model(data, "safe ~ base + method + objective + lr + epochs", ("run", "prompt")),
        both["small_crossed"],
    )
    assert np.allclose(fit.fixed["estimate"], theirs(fit, result)["Estimate"], atol=0.005)
    assert np.allclose(
        fit.fixed["se"], theirs(fit, result)["Std. Error"], rtol=0.007
    )  # ours is exact, lme4's by differences: see the next test
    assert np.allclose(fit.random["sd"], result["varcorr"]["sdcor"], rtol=0.005)
    assert fit.loglik == pytest.approx(result["logLik"], abs=0.01)
    assert fit.df == data["run"].nunique() - len(fit.fixed)
    assert fit.converged
    check_pairs(fit, both["small_contr"]["pairs_none"])


def test_counts_by_category_are_lme4s(shared):
    data = reference(shared, "sim_run_category.csv")
    fit, result = (
        item_model(
            data, "rate ~ base * method + objective + lr + epochs", ("run", "category"), trials="n"
        ),
        fits(shared, "run_category.json")["glmm_run_category"],
    )
    assert np.allclose(fit.fixed["estimate"], theirs(fit, result)["Estimate"], atol=0.005)
    assert np.allclose(fit.fixed["se"], theirs(fit, result)["Std. Error"], rtol=0.005)
    assert np.allclose(fit.random["sd"], result["varcorr"]["sdcor"], rtol=0.005)
    assert fit.loglik == pytest.approx(result["logLik"], abs=0.01)
    check_pairs(fit, fits(shared, "run_category.json")["glmm_run_category_contr"]["pairs_none"])


def test_one_group_of_counts_is_lme4s_and_has_the_errors_of_exact_programs(shared):
    data = pd.read_csv(shared / "reference" / "cbpp.csv").assign(
        share=lambda rows: rows["incidence"] / rows["size"],
        period=lambda rows: rows["period"].astype(str),
    )
    fit, result = (
        item_model(data, "share ~ period", ("herd",), trials="size"),
        fits(shared, "classic.json")["cbpp_nAGQ1"],
    )
    assert np.allclose(fit.fixed["estimate"], theirs(fit, result)["Estimate"], atol=0.005)
    assert np.allclose(fit.random["sd"], result["varcorr"]["sdcor"], rtol=0.005)
    assert fit.loglik == pytest.approx(result["logLik"], abs=0.01)
    # lme4 prints .2312 .3032 .3228 .4220, from differences of a deviance that is converged to 1e-7;
    # programs with exact derivatives (TMB's way) print these
    assert np.allclose(fit.fixed["se"], [0.232474, 0.306643, 0.326638, 0.427437], rtol=5e-4)


def small(rng=None, n=12, m=8) -> laplace.Grid:
    rng = rng or np.random.default_rng(0)
    x = np.column_stack([np.ones(n), rng.integers(0, 2, n), rng.normal(size=n)])
    kinds = np.eye(2)[rng.integers(0, 2, n)]
    eta = (x @ [-0.5, 0.7, 0.3] + rng.normal(size=n) * 0.5)[:, None] + rng.normal(size=m)
    asked = (rng.random((n, m)) < 0.9).astype(float)
    return laplace.Grid(
        (rng.random((n, m)) < expit(eta)) * asked, asked, x, np.arange(n), (np.ones((n, 1)), kinds)
    )


@pytest.mark.parametrize(
    "kind", ["all", "no runs", "one block", "runs of two rows", "runs of two kinds"]
)
def test_the_gradient_is_that_of_differences(kind):
    grid = small()
    n = len(grid.x)
    run = {"no runs": np.full(n, -1), "runs of two rows": np.arange(n) // 2}.get(
        kind, np.append([-1, -1], np.arange(n - 2))
    )
    blocks = grid.blocks[:1] if kind == "one block" else grid.blocks
    kinds = np.arange(run.max() + 1) % 2 if kind == "runs of two kinds" else None
    grid = laplace.Grid(grid.y, grid.trials, grid.x, run, blocks, kinds)
    n_sd = len(grid.blocks) + grid.n_kinds
    at = np.append([-0.3, 0.5, 0.2], np.log([0.6, 0.8, 0.4, 0.7][:n_sd]))

    def evaluated(at: np.ndarray):
        state = laplace.State(
            np.zeros(grid.n_runs), np.zeros((grid.y.shape[1], grid.columns.shape[1]))
        )
        return laplace.log_likelihood(grid, at[:3], np.exp(at[3:]), state)

    by_differences = [
        (evaluated(at + 1e-5 * one)[0] - evaluated(at - 1e-5 * one)[0]) / 2e-5
        for one in np.eye(len(at))
    ]
    assert np.allclose(np.concatenate(evaluated(at)[1:3]), by_differences, atol=1e-4)


def test_the_log_likelihood_is_laplaces_by_the_whole_matrix():
    grid = small()
    grid = laplace.Grid(grid.y, grid.trials, grid.x, np.arange(len(grid.x)), grid.blocks)
    beta, sd = np.array([-0.3, 0.5, 0.2]), np.array([0.6, 0.8, 0.4])
    n, m = grid.y.shape
    state = laplace.State(np.zeros(n), np.zeros((m, 3)))
    found = laplace.log_likelihood(grid, beta, sd, state)[0]
    rows, columns = np.divmod(np.arange(n * m), m)
    z = np.zeros((n * m, n + 3 * m))
    z[np.arange(n * m), rows] = sd[0]
    for k, value in enumerate((grid.columns * [sd[1], sd[2], sd[2]]).T):
        z[np.arange(n * m), n + 3 * columns + k] = value[rows]
    b, y, asked = np.zeros(z.shape[1]), grid.y.ravel(), grid.trials.ravel()
    for _ in range(100):
        p = expit((grid.x @ beta)[rows] + z @ b)
        hessian = z.T @ ((asked * p * (1 - p))[:, None] * z) + np.eye(len(b))
        b = b + np.linalg.solve(hessian, z.T @ (y - asked * p) - b)
    eta = (grid.x @ beta)[rows] + z @ b
    assert found == pytest.approx(
        (y * eta - asked * np.logaddexp(0, eta)).sum()
        - b @ b / 2
        - np.linalg.slogdet(hessian)[1] / 2,
        abs=1e-6,
    )


# ---- simulated verdicts
def verdicts(
    seed=0, n_runs=24, n_prompts=40, run_sd=0.5, prompt_sd=1.0, effect=1.0
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    runs = pd.DataFrame(
        {
            "run_id": [f"r{i:02d}" for i in range(n_runs)],
            "method": np.tile(["ia3", "lora"], n_runs // 2),
            "base_model": np.repeat(["x", "y"], n_runs // 2),
        }
    )
    frame = runs.assign(u=run_sd * rng.normal(size=n_runs)).merge(
        pd.DataFrame(
            {
                "prompt_id": [f"p{j:02d}" for j in range(n_prompts)],
                "b": prompt_sd * rng.normal(size=n_prompts),
            }
        ),
        how="cross",
    )
    eta = -1 + effect * frame["method"].eq("lora") + frame["u"] + frame["b"]
    return frame.assign(unsafe=pd.array(rng.random(len(frame)) < expit(eta), dtype="boolean")).drop(
        columns=["u", "b"]
    )


@pytest.mark.slow
def test_known_effects_are_found_again_within_their_errors():
    z = [
        (lambda row: (row["estimate"] - 1) / row["se"])(
            item_model(verdicts(seed), "unsafe ~ method").fixed.iloc[1]
        )
        for seed in range(30)
    ]
    assert abs(np.mean(z)) < 0.5
    assert 0.75 < np.std(z) < 1.3


@pytest.mark.slow
@settings(max_examples=3)
@given(st.integers(0, 99))
def test_order_and_names_do_not_matter(seed):
    rows = verdicts(1, 12, 15)
    one = item_model(rows, "unsafe ~ method")
    shuffled = rows.sample(frac=1, random_state=seed).assign(
        run_id=lambda frame: "z" + frame["run_id"].str[::-1],
        prompt_id=lambda frame: frame["prompt_id"].str[::-1],
    )
    other = item_model(shuffled, "unsafe ~ method")
    assert np.allclose(one.fixed["estimate"], other.fixed["estimate"], atol=1e-5)
    assert one.loglik == pytest.approx(other.loglik, abs=1e-6)


def test_without_a_spread_between_runs_the_component_is_at_zero_and_the_fit_is_that_without_it():
    for seed in range(20):
        rows = verdicts(seed, run_sd=0.0)
        fit = item_model(rows, "unsafe ~ method")
        if fit.report["singular"]:
            break
    assert fit.report["at_zero"] == ("run_id",)
    assert "component run_id is at zero" in fit.notes
    without = item_model(rows, "unsafe ~ method", ("prompt_id",))
    assert np.allclose(fit.fixed["estimate"], without.fixed["estimate"], atol=1e-4)
    assert fit.loglik == pytest.approx(without.loglik, abs=1e-5)


def test_the_maximal_model_has_a_component_for_each_group_and_is_no_worse():
    rows = verdicts()
    small, large = (
        item_model(rows, "unsafe ~ method"),
        item_model(
            rows,
            "unsafe ~ method",
            ("run_id", "prompt_id", "prompt_id:base_model", "prompt_id:method"),
        ),
    )
    assert large.random["group"].tolist() == [
        "run_id",
        "prompt_id",
        "prompt_id:base_model",
        "prompt_id:method",
    ]
    assert large.loglik >= small.loglik - 1e-6


def test_a_cell_with_all_answers_alike_is_named_and_only_its_contrasts_are_lost():
    rows = verdicts()
    rows.loc[rows["method"].eq("lora") & rows["base_model"].eq("y"), "unsafe"] = True
    fit = item_model(rows, "unsafe ~ base_model * method")
    assert any("separated: 6 of 24" in note for note in fit.notes)
    grid = pd.DataFrame({"base_model": ["x", "x", "y", "y"], "method": ["ia3", "lora"] * 2})
    assert fit.contrast(fit.at(grid))["estimate"].isna().tolist() == [False, False, False, True]
    others = item_model(
        rows[~(rows["method"].eq("lora") & rows["base_model"].eq("y"))],
        "unsafe ~ base_model + method + base_model:method",
    )
    assert fit.loglik == pytest.approx(others.loglik, abs=1e-6)
    found = fit.risk(grid, np.array([[-1, 1, 0, 0], [0, 0, -1, 1]]))
    assert found["estimate"].isna().tolist() == [False, True]


def test_risks_are_means_over_runs_and_prompts():
    fit = item_model(verdicts(), "unsafe ~ method")
    grid = pd.DataFrame({"method": ["ia3", "lora"]})
    found = fit.risk(grid, np.eye(2))["estimate"].to_numpy()
    drawn = (
        np.random.default_rng(0).normal(size=(2, 400_000)) * fit.random["sd"].to_numpy()[:, None]
    )
    eta = fit.at(grid) @ fit.fixed["estimate"].to_numpy()
    assert np.allclose(found, [100 * expit(one + drawn.sum(0)).mean() for one in eta], atol=0.15)
    alone = fit.risk(grid, np.eye(2), alone=[True, False])["estimate"].to_numpy()
    assert alone[0] == pytest.approx(100 * expit(eta[0] + drawn[1]).mean(), abs=0.15)
    assert alone[1] == pytest.approx(found[1])


def test_risks_have_the_spread_of_their_own_methods_runs():
    rows = verdicts(2, n_runs=40)
    noisy = np.random.default_rng(5).normal(0, 3, 40)[rows["run_id"].str[1:].astype(int)]
    shifted = np.random.default_rng(6).random(len(rows)) < expit(noisy)
    rows["unsafe"] = rows["unsafe"].where(rows["method"].eq("ia3"), shifted).astype("boolean")
    fit = item_model(rows, "unsafe ~ method", ("run_id by method", "prompt_id"))
    sd = fit.random.set_index("group")["sd"]
    assert sd["run_id of lora"] > 2 * sd["run_id of ia3"]
    grid = pd.DataFrame({"method": ["ia3", "lora"]})
    eta = fit.at(grid) @ fit.fixed["estimate"].to_numpy()
    total = [np.hypot(sd[f"run_id of {name}"], sd["prompt_id"]) for name in grid["method"]]
    drawn = np.random.default_rng(0).normal(size=400_000)
    expected = [100 * expit(one + s * drawn).mean() for one, s in zip(eta, total, strict=True)]
    assert np.allclose(fit.risk(grid, np.eye(2))["estimate"], expected, atol=0.15)
    alone = rows[rows["run_id"].eq("r01") | rows["method"].eq("ia3")]
    fit = item_model(alone, "unsafe ~ method", ("run_id by method", "prompt_id"))
    assert "component run_id of lora left out: 1 levels" in fit.notes
    assert fit.random["group"].tolist() == ["run_id of ia3", "prompt_id"]


def test_a_base_model_without_seeds_has_no_run_effect():
    rows = verdicts()
    base = rows[rows["run_id"].eq("r00")].assign(run_id=None, method="none")
    fit = item_model(pd.concat([rows, base]), "unsafe ~ method")
    assert fit.df == 24 - 3
    assert fit.random["group"].tolist() == ["run_id", "prompt_id"]


# ---- bad input
def test_what_cannot_be_fitted_says_why():
    rows = verdicts()
    with pytest.raises(ValueError, match="40 answers stand twice"):
        item_model(pd.concat([rows, rows[rows["run_id"].eq("r03")]]), "unsafe ~ method")
    with pytest.raises(ValueError, match="nothing to fit"):
        item_model(
            rows.assign(unsafe=pd.array([pd.NA] * len(rows), dtype="boolean")), "unsafe ~ method"
        )
    with pytest.raises(ValueError, match="all 960 verdicts are alike"):
        item_model(rows.assign(unsafe=False), "unsafe ~ method")
    nested = rows.assign(category="one")
    with pytest.raises(ValueError, match="does not begin with 'prompt_id'"):
        item_model(nested, "unsafe ~ method", ("run_id", "prompt_id", "category"))
    with pytest.raises(ValueError, match="must be the only group"):
        rate_model(rows.assign(rate=1.0, day=2.0), "rate ~ method", ("day | run_id", "prompt_id"))


def test_poor_data_give_the_most_that_can_be_said():
    rows = verdicts()
    rows.loc[rows["method"].eq("lora"), "unsafe"] = pd.NA  # all null in a group
    fit = item_model(rows, "unsafe ~ base_model + method")
    told = " ".join(fit.notes)
    assert "480 rows left out" in told
    assert np.isfinite(fit.fixed["estimate"]).all()
    single = item_model(verdicts()[lambda frame: frame["run_id"].eq("r01")], "unsafe ~ 1")
    assert "component run_id left out: 1 levels" in single.notes
    assert single.df == 0
    assert single.fixed["se"].isna().all()
    one_base = item_model(
        verdicts()[lambda frame: frame["base_model"].eq("x")],
        "unsafe ~ base_model + method",
        ("run_id", "prompt_id", "prompt_id:base_model"),
    )
    assert "component prompt_id:base_model left out: one level" in one_base.notes


def test_separation_is_found_by_the_program_and_nothing_else():
    x = np.column_stack([np.ones(6), [0, 0, 0, 1, 1, 1]])
    everywhere = np.ones(6, bool)
    assert (
        logistic._separated(x, np.array([0, 0, 1, 1, 1, 1]), everywhere).tolist()
        == [False] * 3 + [True] * 3
    )
    assert not logistic._separated(x, np.array([0, 1, -1, 1, -1, 0]), everywhere).any()


def test_the_crossed_model_knows_that_methods_answer_other_prompts():
    """Without prompt x method a difference of methods was covered in 70 % of simulated studies."""
    rng, n, rows = np.random.default_rng(4), 60, []
    own = {method: 1.5 * rng.normal(size=n) for method in ("none", "lora", "ia3")}
    prompt = rng.normal(size=n)
    for base in ("b", "c"):
        for method, runs in (("none", 1), ("lora", 4), ("ia3", 4)):
            for run in range(runs):
                eta = -0.5 + prompt + own[method] + 0.2 * rng.normal()
                name = None if method == "none" else f"{base}{method}{run}"
                answers = {"run_id": name, "base_model": base, "method": method}
                unsafe = rng.uniform(size=n) < expit(eta)
                rows.append(pd.DataFrame({**answers, "prompt_id": range(n), "unsafe": unsafe}))
    items = pd.concat(rows).assign(log10_rate=0.0)
    grid = marginal_means.means_grid(items, ())
    names, weights = marginal_means.contrasts(grid)
    wide = []
    for groups in (mixed_effects.CROSSED["crossed"], ("run_id by method", "prompt_id")):
        fit = item_model(items, "unsafe ~ base_model * method", groups)
        labels = {"study": "s", "notebook": "n", "outcome": "o", "benchmark": "b", "judge": "j"}
        found = marginal_means.of_risks(fit, grid, names, weights, "crossed", **labels)
        asked = found["base_model"].eq("all") & found["contrast"].eq("difference")
        wide.append(found.loc[asked, "se"].astype(float).item())
    assert wide[0] > 1.5 * wide[1]
