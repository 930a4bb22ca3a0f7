"""The original study's own tests, run again, and what its answers say of its labels."""

import math
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare, norm, wilcoxon

from driftbook.rereading import original_study
from driftbook.rereading.original_analysis import LABELS, SAME_LENGTH, SAME_VERDICT, SETTING
from driftbook.stats import estimation
from driftbook.stats.terms import RUN


# ---- the study's own tests
def outliers(utility: pd.Series, k: float = 1.5) -> pd.Series:
    """Runs outside Tukey's fence: more than k interquartile ranges beyond the quartiles."""
    low, high = utility.quantile(0.25), utility.quantile(0.75)
    return (utility < low - k * (high - low)) | (utility > high + k * (high - low))


def signed_rank(change: np.ndarray) -> dict[str, float]:
    """Wilcoxon's signed-rank test against zero as the study ran it: p, r = z / sqrt(n), n changes
    that are not zero; z is the normal quantile of p.

    p is exact for at most 50 changes of which none is zero (whether or not sizes tie), else by the
    normal approximation: scipy's choice before 1.13.
    """
    n = int(np.count_nonzero(change))
    p = float(wilcoxon(change, method="exact" if n == len(change) <= 50 else "approx").pvalue)
    return {"p": p, "r": -norm.ppf(p / 2) / math.sqrt(n), "n": n}


def largest_r(n: int) -> float:
    """The r of n changes of one sign. Their exact p is 2 / 2^n, and r exceeds 1 for most n, since z
    is taken from p and not from the statistic.
    """
    return -norm.ppf(2.0**-n) / math.sqrt(n)


def friedman(table: pd.DataFrame) -> dict[str, float]:
    """Friedman's test over the columns of complete rows: p and Kendall's W = chi2 / (n (k - 1)),
    with n rows.
    """
    table = table.dropna()
    found = friedmanchisquare(*(table[name] for name in table))
    return {
        "p": float(found.pvalue),
        "W": float(found.statistic) / (len(table) * (table.shape[1] - 1)),
        "n": len(table),
    }


def own_tests(rows: pd.DataFrame, rate: str = "labelled") -> pd.DataFrame:
    """The study's tests on averages over rounds, under the names of
    data/original_study/effect_sizes.csv: comparison, statistic, value, n.

    On changes as the study rounds them: whether changes tie or vanish decides p, and with it r.
    """
    keys = ["base_model", "method", *SETTING, rate]
    means = rows.groupby(keys)["printed_change"].mean()
    found = {
        f"{method} against the base model": signed_rank(part.to_numpy())
        for method, part in means.groupby("method", sort=False)
    }
    found["among the four methods"] = friedman(means.unstack("method"))
    found |= {
        f"{base} against its base model": signed_rank(part.to_numpy())
        for base, part in means.groupby("base_model", sort=False)
    }
    bases = means.unstack(
        "base_model"
    ).dropna()  # as the study aligns its groups: settings that all base models have
    for one, other in permutations(bases, 2):
        found[f"{one} against {other}"] = signed_rank((bases[one] - bases[other]).to_numpy())
    return pd.DataFrame(
        [
            (name, statistic, one[statistic], one["n"])
            for name, one in found.items()
            for statistic in ("r", "W", "p")
            if statistic in one
        ],
        columns=["comparison", "statistic", "value", "n"],
    )


def post_hoc(rows: pd.DataFrame) -> pd.DataFrame:
    """Wilcoxon's test for each pair of methods on the configurations that all four have,
    Bonferroni's p: method, other, r, p, p_adjusted, n.
    """
    table = (
        rows.groupby(["base_model", "method", *SETTING, "labelled"])["printed_change"]
        .mean()
        .unstack("method")
        .dropna()
    )
    pairs = [
        (a, b, signed_rank((table[a] - table[b]).to_numpy())) for a, b in combinations(table, 2)
    ]
    found = pd.DataFrame([{"method": a, "other": b, **one} for a, b, one in pairs])
    return found.assign(p_adjusted=(found["p"] * len(found)).clip(upper=1))


def reproduction(rows: pd.DataFrame) -> pd.DataFrame:
    """Published statistics beside ours under each way to choose runs; `reproduced` names the ways
    that agree to the digits printed.
    """
    cited = original_study.cited("effect_sizes")
    published = cited[cited["statistic"].ne("n")].set_index(["comparison", "statistic"])["value"]
    n_left_out = int(cited.set_index("comparison")["value"]["utility outliers left out"])
    ways = {
        "all runs": rows,
        **{name: rows[~left_out] for name, left_out in _left_out(rows, n_left_out).items()},
    }
    ways["true rates"] = rows
    ours = {
        name: (
            own_tests(part, "rate" if name == "true rates" else "labelled").set_index(
                ["comparison", "statistic"]
            )
        )
        for name, part in ways.items()
    }
    table = pd.DataFrame(
        {"published": published}
        | {name: one["value"].reindex(published.index) for name, one in ours.items()}
    )
    digits = published.map(lambda value: len(f"{value}".partition(".")[2]))
    same = {
        name: (table[name] - table["published"]).abs() <= 0.5 * 10.0**-digits + 1e-12
        for name in ways
    }
    return table.assign(
        reproduced=pd.DataFrame(same).apply(lambda row: ", ".join(row.index[row]) or "none", axis=1)
    ).reset_index()


def _left_out(rows: pd.DataFrame, n_published: int) -> dict[str, pd.Series]:
    """Which runs each way leaves out; no way where utility is not known (the package's reader does
    not read it).
    """
    if rows["utility"].isna().all():
        return {}
    fence = outliers(rows["utility"])
    lowest = rows["utility"].rank(method="first") <= n_published
    return {
        f"without the {fence.sum()} outside the fence": fence,
        f"without the {n_published} lowest in utility": lowest,
    }


def of_tests(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The table of `reproduction` as estimates, with the largest r that the configurations of each
    comparison allow.
    """
    ways = [name for name in table if name not in ("comparison", "statistic", "reproduced")]
    long = table.melt(
        id_vars=["comparison", "statistic"], value_vars=ways, var_name="group", value_name="value"
    )
    ours = own_tests(rows)
    most = ours[ours["statistic"].eq("r") & ours["comparison"].isin(table["comparison"])]
    most = most.assign(group="largest possible", value=most["n"].map(largest_r), n_items=most["n"])
    found = (
        pd.concat([long, most.drop(columns="n")], ignore_index=True)
        .rename(columns={"comparison": "contrast"})
        .drop_duplicates(["contrast", "statistic", "group"])
    )
    how = "the study's own tests on averages over rounds; n_items: configurations"
    return estimation.complete(
        found.assign(
            **LABELS,
            outcome="statistic " + found["statistic"],
            base_model="all",
            method="all",
            population="these configurations",
            how=how,
        ).drop(columns="statistic")
    )


# ---- what the answers say of the labels
def agreement(rows: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Each run labelled 1e-3 against the runs labelled 2e-5, and against those of other rounds with
    its own label, all else equal.

    Columns: run_id, base_model, method, objective, round, n_others; same_length and same_verdict:
    percent of prompts, mean over the runs labelled 2e-5; own_length and own_verdict: over the
    others labelled 1e-3 (null where there are none).
    """
    length, safe = (
        items.pivot(index="run_id", columns="prompt_id", values=name)
        .astype(float)
        .loc[rows["run_id"]]
        .to_numpy()
        for name in ("response_chars", "safe")
    )
    high, found = rows["labelled"].gt(1e-4).to_numpy(), []
    cells = rows.groupby(["base_model", "method", *SETTING]).indices.values()
    for cell in cells:
        low = cell[~high[cell]]
        for run in cell[high[cell]]:
            own = np.setdiff1d(cell[high[cell]], [run])
            if len(low):
                found.append(
                    (
                        run,
                        len(low),
                        *_equal(length, run, low),
                        *_equal(safe, run, low),
                        *_equal(length, run, own),
                        *_equal(safe, run, own),
                    )
                )
    table = pd.DataFrame(
        found,
        columns=["row", "n_others", "same_length", "same_verdict", "own_length", "own_verdict"],
    )
    return pd.concat(
        [
            rows[["run_id", "base_model", "method", "objective", "round", "labelled", "rate"]]
            .iloc[table.pop("row")]
            .reset_index(drop=True),
            table,
        ],
        axis=1,
    )


def _equal(values: np.ndarray, run: int, others: np.ndarray) -> tuple[float]:
    """The percent of prompts with an equal value, mean over the others; pairs with a null are left
    out.
    """
    if not len(others):
        return (math.nan,)
    both = ~np.isnan(values[others]) & ~np.isnan(values[run])
    return (float(100 * ((values[others] == values[run]) & both).sum() / both.sum()),)


def of_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """The mean agreement of each method and round, and each run's own, as estimates."""
    parts = []
    for outcome, column in ((SAME_LENGTH, "same_length"), (SAME_VERDICT, "same_verdict")):
        found = table.groupby(["method", "round"])[column].agg(["mean", "size"]).reset_index()
        means = found.assign(
            base_model="all",
            group="round",
            member=found["round"].astype(str),
            value=found["mean"],
            n_runs=found["size"],
        )
        single = table.assign(group=RUN, member=table["run_id"], value=table[column], n_runs=1)
        keep = ["base_model", "method", "group", "member", "value", "n_runs"]
        parts.append(pd.concat([means[keep], single[keep]]).assign(outcome=outcome))
    how = (
        "mean over pairs of runs of equal base model, method, objective and epochs; no interval:"
        " the prompts are all there are"
    )
    return estimation.complete(
        pd.concat(parts).assign(
            **LABELS,
            contrast="labelled 1e-3 against labelled 2e-5",
            n_items=330,
            population="these runs, these prompts",
            how=how,
        )
    )
