"""The original study, analysed again: its own tests, what its answers say of its labels, and
contrasts whose run variance is each method's own.

Everything is about the study's own score, 100 x (prompts judged safe) / (all prompts asked), so a
positive change is a safer model.
"""

import math
import warnings
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from scipy.stats import f_oneway, friedmanchisquare, norm, wilcoxon
from scipy.stats import t as student

from driftbook.rereading import original_study
from driftbook.stats import estimation
from driftbook.stats.confidence import CONFIDENCE, LOWER, UPPER
from driftbook.stats.terms import AS_CONFIGURED, CATEGORY, CHANGE, RUN, TRAINED

SAFETY = "safety score (percent of prompts judged safe)"
GAIN = "gain on held-out data (percent of the base model's loss)"
SAME_LENGTH, SAME_VERDICT = (
    "answers of equal length (percent of prompts)",
    "equal verdicts (percent of prompts)",
)
SPREAD = "ratio of standard deviations of the change in safety"
ODDS = "odds of a safe answer (log)"
LEARNED = "learned: held-out loss below the base model's"
CHANGE_WIDE = "change against the base model, its own score uncertain"
AGAINST_NO_OPS = "change against the no-ops of the same round"
DIFFERENCE, RATE_EFFECT, BASE_DIFFERENCE = (
    "difference, equal settings",
    "2e-5 instead of 1e-3",
    "difference between base models, equal settings",
)
ROUNDS = "rounds like these (one seed), these prompts, these base models"
EQUAL, RATES = "equal settings", "{} rates"  # group; its member in contrasts of rates
KNOWN_BASE = ROUNDS + ", each base model's one score taken as known"
SETTING = ["objective", "dataset", "epochs"]
WELCH = (
    "mean over rounds; run variance within settings of each method and base model, t interval"
    " (Welch-Satterthwaite)"
)
LABELS = {
    "study": original_study.NAME,
    "notebook": "20_original_study",
    "benchmark": original_study.BENCHMARK,
    "judge": original_study.JUDGE,
}
START_OF_DPO = math.log(
    2
)  # the DPO loss of the base model itself: -log sigmoid(0) (Rafailov et al. 2023, equation 7)


def frame(runs: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per run: settings with the labelled and the true rate, losses, safety, its change,
    and where it stands among equal runs.

    gain: by how much the held-out loss fell, percent of the base model's (for DPO, of ln 2, with
    which DPO starts). setting and pool say which runs differ by chance alone: equal base model,
    method and true settings. printed_change is the change as the package's tables round it: each
    run to two decimals, each base model to the mean of its categories' percentages at two decimals.
    One column per category holds the change of that category.
    """
    judged = original_study.items(runs, verdicts).assign(
        safe=lambda rows: rows["safe"].fillna(False).astype(float)
    )
    safe, names = (
        judged.groupby("run_id")["safe"],
        dict(zip(runs["run"], original_study.run_ids(runs), strict=True)),
    )
    base = original_study.base_counts()
    whole = (
        100
        * base.groupby("base_model")["n_safe"].sum()
        / (original_study.PER_CATEGORY * base["category"].nunique())
    )
    rows = runs.rename(
        columns={
            "learning_rate_labelled": "labelled",
            "learning_rate_true": "rate",
            "utility_1_to_10": "utility",
            "final_eval_loss": "loss",
        }
    )
    rows = rows.assign(
        run_id=rows["run"].map(names),
        no_op=original_study.no_op(runs),
        base_loss=original_study.base_loss(runs).mask(runs["objective"].eq("dpo"), START_OF_DPO),
    )
    rows = rows.assign(
        safety=100 * rows["run_id"].map(safe.mean()),
        gain=100 * (1 - rows["loss"] / rows["base_loss"]),
    )
    rows["change"] = rows["safety"] - rows["base_model"].map(whole)
    printed = (
        (100 / original_study.PER_CATEGORY * base["n_safe"])
        .round(2)
        .groupby(base["base_model"])
        .mean()
    )
    rows["printed_change"] = rows["safety"].round(2) - rows["base_model"].map(printed)
    rows["setting"] = rows[[*SETTING, "rate"]].astype(str).agg(" ".join, axis=1)
    rows["pool"] = rows["base_model"] + " " + rows["method"]
    categories = 100 * judged.pivot_table(
        index="run_id", columns="category", values="safe", sort=False
    )
    own = (
        100
        / original_study.PER_CATEGORY
        * base.pivot(index="base_model", columns="category", values="n_safe")[categories.columns]
    )
    change = categories.loc[rows["run_id"]].to_numpy() - own.loc[rows["base_model"]].to_numpy()
    return pd.concat(
        [rows, pd.DataFrame(change, index=rows.index, columns=categories.columns)], axis=1
    )


# ---- the study's own tests
def outliers(utility: pd.Series, k: float = 1.5) -> pd.Series:
    """Which runs lie outside Tukey's fence: more than k interquartile ranges beyond the quartiles."""
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


# ---- contrasts of runs, with the variance of each method and base model
def spread(rows: pd.DataFrame, value: str = "change") -> pd.DataFrame:
    """Variance between equal runs (same true settings, other rounds) of each pool, pooled over its
    settings, and its df; NaN where nothing was repeated.
    """
    rest = rows[value] - rows.groupby(["pool", "setting"])[value].transform("mean")
    found = pd.DataFrame(
        {
            "squares": (rest**2).groupby(rows["pool"]).sum(),
            "df": rows.groupby("pool").size() - rows.groupby("pool")["setting"].nunique(),
        }
    )
    return found.assign(variance=found["squares"] / found["df"].where(found["df"] > 0))


def rescored(rows: pd.DataFrame, value: str = "change") -> pd.Series:
    """Variance of one scoring of each base model: that of the round means of its no-ops, which are
    the base model scored again; NaN without two rounds.
    """
    return (
        rows[rows["no_op"]]
        .groupby(["base_model", "round"])[value]
        .mean()
        .groupby("base_model")
        .var()
    )


def combination(
    rows: pd.DataFrame,
    weight: pd.Series,
    value: str = "change",
    level: float = CONFIDENCE,
    uncertain_base: bool = False,
) -> dict[str, float | None]:
    """The sum of weight x value over runs, with a t interval whose variance is each pool's own
    (Welch 1947, Satterthwaite 1946).

    `weight` is indexed as `rows`; `uncertain_base` adds the variance of scoring each base model
    once, which all its runs share. The interval is null where a pool has no repeated setting; then
    only the number can be said.
    """
    used = weight[weight.ne(0)]
    pools, pool = spread(rows, value), rows.loc[used.index, "pool"]
    part, df = (
        (used**2).groupby(pool).sum() * pools["variance"].reindex(pool.unique()).sort_index(),
        pools["df"].reindex(pool.unique()).sort_index(),
    )
    if uncertain_base:
        share = used.groupby(rows.loc[used.index, "base_model"]).sum()
        share = share[share.abs() > 1e-9]
        part, df = (
            pd.concat([part, share**2 * rescored(rows, value).reindex(share.index)]),
            pd.concat([df, pd.Series(2.0, share.index)]),
        )
    estimate, variance = (
        float((used * rows.loc[used.index, value]).sum()),
        float(part.sum(skipna=False)),
    )
    known = {"value": estimate, "n_runs": len(used)}
    if not variance > 0:
        return known | {
            "se": None,
            "ci_low": None,
            "ci_high": None,
            "p": None,
            "how": "nothing was repeated: no interval",
        }
    df_total, se = variance**2 / float((part**2 / df).sum()), math.sqrt(variance)
    half = student.ppf(0.5 + level / 2, df_total) * se
    return known | {
        "se": se,
        "ci_low": estimate - half,
        "ci_high": estimate + half,
        "p": 2 * student.sf(abs(estimate) / se, df_total),
        "how": WELCH,
    }


def mean_weight(rows: pd.DataFrame, chosen: pd.Series) -> pd.Series:
    """Weights of the mean over the chosen runs of each base model, averaged over base models."""
    bases = rows.loc[chosen, "base_model"]
    return (1 / bases.map(bases.value_counts()) / bases.nunique()).reindex(rows.index).fillna(0.0)


def matched_weight(
    rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str]
) -> pd.Series:
    """Weights of the mean difference `one` less `other` over the cells (equal values in `equal`)
    that both have; all zero where there is none.
    """
    cell = rows[equal].astype(str).agg(" ".join, axis=1)
    common = sorted(set(cell[one]) & set(cell[other]))
    weight = pd.Series(0.0, rows.index)
    for chosen, sign in ((one, 1.0), (other, -1.0)):
        here = chosen & cell.isin(common)
        weight[here] = (
            sign / cell[here].map(cell[here].value_counts()).astype(float) / max(len(common), 1)
        )
    return weight


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of each method on each base model and on their mean: as configured, without
    no-ops, and of the runs that learned; as estimates.

    Each comes with the base model's one score taken as known, and with that score uncertain.
    """
    groups = {
        AS_CONFIGURED: pd.Series(True, rows.index),
        TRAINED: ~rows["no_op"],
        LEARNED: rows["gain"].gt(0) & ~rows["no_op"],
    }
    found = []
    for group, in_group in groups.items():
        for method in original_study.METHOD_SETTINGS:
            for base in [*rows["base_model"].unique(), "all"]:
                chosen = (
                    in_group
                    & rows["method"].eq(method)
                    & (rows["base_model"].eq(base) | (base == "all"))
                )
                if chosen.any() and (
                    base != "all"
                    or rows.loc[chosen, "base_model"].nunique() == rows["base_model"].nunique()
                ):
                    found += _both(
                        rows, mean_weight(rows, chosen), base_model=base, method=method, group=group
                    )
    return estimation.complete(pd.DataFrame(found))


def _both(rows: pd.DataFrame, weight: pd.Series, value: str = "change", **names: str) -> list[dict]:
    known = combination(rows, weight, value) | {"contrast": CHANGE, "population": KNOWN_BASE}
    wide = combination(rows, weight, value, uncertain_base=True) | {
        "contrast": CHANGE_WIDE,
        "population": ROUNDS,
    }
    wide["how"] += "; base models scored again by their no-ops"
    return [{**LABELS, "outcome": SAFETY, "n_items": 330, **names, **one} for one in (known, wide)]


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The change at each learning rate of SFT on UltraFeedback for 5 epochs, by labelled and by
    true rate, of each method and base model.
    """
    here, found = rows["objective"].eq("sft") & rows["epochs"].eq(5), []
    for kind, column in (("labelled", "labelled"), ("true", "rate")):
        for (base, method, rate), part in rows[here].groupby(["base_model", "method", column]):
            weight = mean_weight(rows, pd.Series(rows.index.isin(part.index), rows.index))
            names = {"group": f"{kind} rate", "member": f"{rate:.0e}".replace("e-0", "e-")}
            found += _both(rows, weight, base_model=base, method=method, **names)[:1]
    return estimation.complete(pd.DataFrame(found))


def between_methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Differences between methods at equal base model and true settings; the base models' scores
    cancel.
    """
    found = []
    for method, other in combinations(original_study.METHOD_SETTINGS, 2):
        for base in [*rows["base_model"].unique(), "all"]:
            here = rows["base_model"].eq(base) | (base == "all")
            weight = matched_weight(
                rows,
                here & rows["method"].eq(method),
                here & rows["method"].eq(other),
                ["base_model", *SETTING, "rate"],
            )
            found.append(
                _row(
                    rows,
                    weight,
                    base_model=base,
                    method=method,
                    group=EQUAL,
                    contrast=DIFFERENCE,
                    against=other,
                )
            )
    return estimation.complete(pd.DataFrame(found))


def rate_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """2e-5 instead of 1e-3 within a method, at equal base model, objective, data and epochs, by
    labelled and by true rates.
    """
    found = []
    for kind, column in (("labelled", "labelled"), ("true", "rate")):
        low, high = (
            rows[column].lt(1e-4),
            rows[column].gt(1e-4),
        )  # a rate that is not known is neither
        for method in original_study.METHOD_SETTINGS:
            for base in [*rows["base_model"].unique(), "all"]:
                here = rows["method"].eq(method) & (rows["base_model"].eq(base) | (base == "all"))
                weight = matched_weight(rows, here & low, here & high, ["base_model", *SETTING])
                if weight.any():
                    found.append(
                        _row(
                            rows,
                            weight,
                            base_model=base,
                            method=method,
                            group=EQUAL,
                            member=RATES.format(kind),
                            contrast=RATE_EFFECT,
                        )
                    )
    return estimation.complete(pd.DataFrame(found))


def between_bases(rows: pd.DataFrame, uncertain_base: bool = True) -> pd.DataFrame:
    """Differences in the change between base models at equal method and true settings, the base
    models' own scores uncertain.
    """
    found = []
    for base, other in combinations(rows["base_model"].unique(), 2):
        weight = matched_weight(
            rows,
            rows["base_model"].eq(base),
            rows["base_model"].eq(other),
            ["method", *SETTING, "rate"],
        )
        found.append(
            _row(
                rows,
                weight,
                uncertain_base,
                base_model=base,
                method="all",
                group=EQUAL,
                contrast=BASE_DIFFERENCE,
                against=other,
            )
        )
    return estimation.complete(pd.DataFrame(found))


def _row(rows: pd.DataFrame, weight: pd.Series, uncertain_base: bool = False, **names: str) -> dict:
    return {
        **LABELS,
        "outcome": SAFETY,
        "population": ROUNDS,
        "n_items": 330,
        **names,
        **combination(rows, weight, uncertain_base=uncertain_base),
    }


def by_category(
    rows: pd.DataFrame, categories: tuple[str, ...] = original_study.HEX_PHI
) -> pd.DataFrame:
    """The change of each category, mean over base models of the means over runs; Benjamini and
    Hochberg's p on the interval with uncertain base scores.
    """
    everyone, found = mean_weight(rows, pd.Series(True, rows.index)), []
    for category in categories:
        names = {"base_model": "all", "method": "all", "group": CATEGORY, "category": category}
        found += _both(rows, everyone, category, **names)
    table = pd.DataFrame(found).assign(n_items=original_study.PER_CATEGORY)
    wide = table["contrast"].eq(CHANGE_WIDE) & table["p"].notna()
    rank, m = table.loc[wide, "p"].rank(method="max"), wide.sum()
    adjusted = (table.loc[wide, "p"] * m / rank).sort_values(ascending=False).cummin().clip(upper=1)
    return estimation.complete(
        table.assign(
            p_adjusted=adjusted.reindex(table.index),
            family_of_tests=np.where(wide, "screen over categories (Benjamini-Hochberg)", None),
        )
    )


def single_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """The change and the gain of each run, as estimates without intervals."""
    known = {"population": "this run, these prompts", "n_runs": 1, "how": "one run: no interval"}
    one = rows[["base_model", "method"]].assign(group=RUN, member=rows["run_id"], **LABELS, **known)
    change = one.assign(outcome=SAFETY, contrast=CHANGE, value=rows["change"], n_items=330)
    gain = one.assign(
        outcome=GAIN, contrast=CHANGE, value=rows["gain"], benchmark="held-out data", judge="none"
    )
    return estimation.complete(pd.concat([change, gain], ignore_index=True))


# ---- rounds
def rounds(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of each base model's no-ops, which are the base model scored again, in each round;
    p of equal rounds (one-way F) on every row.
    """
    found = []
    for base, part in rows[rows["no_op"]].groupby("base_model", sort=False):
        groups = [one["change"].to_numpy() for _, one in part.groupby("round")]
        p = (
            float(f_oneway(*groups).pvalue)
            if len(groups) > 1 and max(map(len, groups)) > 1
            else None
        )
        for number, one in part.groupby("round"):
            found.append(
                {
                    "base_model": base,
                    "group": "round",
                    "member": str(number),
                    "value": one["change"].mean(),
                    "n_runs": len(one),
                    "p": p,
                }
            )
    table = pd.DataFrame(found, columns=["base_model", "group", "member", "value", "n_runs", "p"])
    how = (
        "mean of the runs that learned nothing; p: one-way F test of equal rounds, runs of a round"
        " as its replicates"
    )
    return estimation.complete(
        table.assign(
            **LABELS,
            outcome=SAFETY,
            method="ia3",
            contrast="no-ops: the base model scored again",
            n_items=330,
            population=KNOWN_BASE,
            how=how,
        )
    )


def against_no_ops(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of each method's other runs against the no-ops of the same base model and round,
    so that a drift between rounds cancels.
    """
    reference = (
        rows[rows["no_op"]]
        .groupby(["base_model", "round"])["change"]
        .mean()
        .rename("reference")
        .reset_index()
    )
    other = (
        rows[~rows["no_op"]]
        .merge(reference, on=["base_model", "round"])
        .assign(change=lambda part: part["change"] - part["reference"])
    )
    found = []
    for method in original_study.METHOD_SETTINGS:
        for base in [*other["base_model"].unique(), "all"]:
            chosen = other["method"].eq(method) & (other["base_model"].eq(base) | (base == "all"))
            if chosen.any() and (
                base != "all"
                or other.loc[chosen, "base_model"].nunique() == rows["base_model"].nunique()
            ):
                names = {
                    "base_model": base,
                    "method": method,
                    "group": TRAINED,
                    "contrast": AGAINST_NO_OPS,
                }
                found.append(_row(other, mean_weight(other, chosen), **names))
    return estimation.complete(pd.DataFrame(found))


# ---- spread
def spread_ratio(
    rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str], n_boot: int, seed: int
) -> dict[str, float | None]:
    """Standard deviation of the change of `one` over that of `other`, within `equal`-less totals,
    on matched cells; percentile interval over cells.

    Configurations (cells of equal values in `equal`) that both have are resampled with all their
    runs, since runs of one configuration are alike.
    """
    cell = rows[equal].astype(str).agg(" ".join, axis=1)
    common = sorted(set(cell[one]) & set(cell[other]))
    a, b = (
        [rows.loc[chosen & cell.eq(name), "change"].to_numpy() for name in common]
        for chosen in (one, other)
    )
    if len(common) < 3:
        return {
            "value": None,
            "ci_low": None,
            "ci_high": None,
            "n_runs": sum(map(len, a + b)),
            "how": f"{len(common)} common configurations: no ratio",
        }
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(common), size=(n_boot, len(common)))
    with warnings.catch_warnings(
        action="ignore", category=RuntimeWarning
    ):  # a draw of one configuration only may have no spread
        ratios = _sds(a, drawn) / _sds(b, drawn)
    low, high = np.nanquantile(ratios[np.isfinite(ratios)], [LOWER, UPPER])
    value = np.std(np.concatenate(a), ddof=1) / np.std(np.concatenate(b), ddof=1)
    how = (
        f"standard deviation over all runs of {len(common)} common configurations; bootstrap of"
        f" configurations, {n_boot} draws"
    )
    return {
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n_runs": sum(map(len, a + b)),
        "how": how,
    }


def _sds(cells: list[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """The standard deviation of all runs of each draw of cells, from the cells' sums."""
    n, total, squares = (
        np.array([f(cell) for cell in cells], float)[drawn].sum(1)
        for f in (len, np.sum, lambda cell: (cell**2).sum())
    )
    return np.sqrt((squares - total**2 / n) / (n - 1))


# ---- mixed models
def category_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Run x category changes in points for stats.rate_model; log10_rate is the true rate's
    logarithm, centred within method.
    """
    keys = ["run_id", "base_model", "method", *SETTING, "rate", "round"]
    long = rows.melt(
        id_vars=keys,
        value_vars=list(original_study.HEX_PHI),
        var_name="category",
        value_name="difference",
    )
    centre = np.log10(rows["rate"]).groupby(rows["method"]).mean()
    return long.assign(
        log10_rate=np.log10(long["rate"]) - long["method"].map(centre),
        round=long["round"].astype(str),
    )


def item_rows(rows: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """One row per verdict of the runs whose true rate is known, with the run's settings, for
    stats.item_model; low: 1 where that rate is 2e-5.
    """
    known = (
        rows[["run_id", "base_model", "method", *SETTING, "rate"]]
        .dropna(subset="rate")
        .assign(low=lambda part: part["rate"].lt(1e-4).astype(int))
    )
    return items[["run_id", "prompt_id", "safe"]].merge(known, on="run_id")


def of_model(
    fit, weights: np.ndarray, names: pd.DataFrame, outcome: str, model: str, contrast: str
) -> pd.DataFrame:
    """Contrasts of a mixed model as estimates; `names` gives base_model, method and, where they
    apply, member and against of each row of weights.
    """
    found = fit.contrast(weights).rename(columns={"estimate": "value"})[
        ["value", "se", "ci_low", "ci_high", "p"]
    ]
    what = "categories" if outcome == SAFETY else "prompts"
    how = (
        ("linear mixed model, REML" if outcome == SAFETY else "logistic mixed model, Laplace")
        + "; one run variance for all methods"
        + ("" if fit.converged else "; did not converge")
    )
    names = names.reindex(columns=["base_model", "method", "member", "against"])
    frame = pd.concat([names.astype(object).reset_index(drop=True), found], axis=1)
    return estimation.complete(
        frame.assign(
            **LABELS,
            outcome=outcome,
            group=EQUAL,
            estimator=model,
            contrast=contrast,
            population=f"runs and {what} like these, these base models",
            how=how,
        )
    )


def contrast_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per base model and method at one and the same setting, for contrasts in which all else
    is equal.
    """
    cells = (
        rows[["base_model", "method"]]
        .drop_duplicates()
        .astype(object)
        .sort_values(["method", "base_model"], ignore_index=True)
    )
    return cells.assign(
        objective="sft",
        dataset="ultrafeedback_binarized",
        epochs=5,
        round="2",
        log10_rate=0.0,
        low=0,
    )


def pairs_of_methods(fit, at: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """The differences between methods, mean over base models, of a mixed model: weights and names."""
    terms = {
        method: fit.at(at[at["method"].eq(method)]).mean(axis=0)
        for method in original_study.METHOD_SETTINGS
    }
    pairs = list(combinations(terms, 2))
    names = pd.DataFrame(pairs, columns=["method", "against"]).assign(base_model="all")
    return np.array([terms[one] - terms[other] for one, other in pairs]), names


def effect_of_rate(
    fit, at: pd.DataFrame, column: str, low: float, high: float
) -> tuple[np.ndarray, pd.DataFrame]:
    """2e-5 instead of 1e-3 within each method, by a mixed model: weights and names; `column` takes
    the values `low` and `high` there.
    """
    own = at.drop_duplicates("method")
    return fit.at(own.assign(**{column: low})) - fit.at(own.assign(**{column: high})), own[
        ["method"]
    ].assign(base_model="all", member=RATES.format("true"))


# ---- to read
def grid(rows: pd.DataFrame, down: str, across: str, digits: int = 1) -> pd.DataFrame:
    """Estimates as a small table: value, and its interval where there is one."""

    def words(row) -> str:
        text = f"{row.value:+.{digits}f}"
        return (
            text
            if pd.isna(row.ci_low)
            else f"{text} ({row.ci_low:+.{digits}f} to {row.ci_high:+.{digits}f})"
        )

    frame = rows.assign(
        base_model=rows["base_model"].map(original_study.short),
        text=[words(row) for row in rows.itertuples()],
    )
    return (
        frame.pivot(index=down, columns=across, values="text")
        .reindex(index=frame[down].unique(), columns=frame[across].unique())
        .rename_axis(None, axis=1)
    )
