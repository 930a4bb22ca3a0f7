"""The original study, analysed again: its own tests, what its answers say of its labels, and
contrasts whose run variance is each method's own.

Everything is about the study's own score, 100 x (prompts judged safe) / (all prompts asked), so a
positive change is a safer model.
"""

import math
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import f_oneway

from driftbook.rereading import original_study, original_tables
from driftbook.rereading.original_contrasts import combination, matched_weight, mean_weight
from driftbook.stats import estimation
from driftbook.stats.terms import AS_CONFIGURED, CATEGORY, CHANGE, RUN, TRAINED

SAFETY = "safety score (percent of prompts judged safe)"
GAIN = "gain on held-out data (percent of the base model's loss)"
SAME_LENGTH, SAME_VERDICT = (
    "answers of equal length (percent of prompts)",
    "equal verdicts (percent of prompts)",
)
ODDS = "odds of a safe answer (log)"
LEARNED = "learned: held-out loss below the base model's"
CHANGE_WIDE = "change against the base model, its own score uncertain"
AGAINST_NO_OPS = "change against the no-ops of the same round"
DIFFERENCE, RATE_EFFECT, BASE_DIFFERENCE = (
    "difference, equal settings",
    "2e-5 instead of 1e-3",
    "difference between base models, equal settings",
)
ROUNDS_POPULATION = "rounds like these (one seed), these prompts, these base models"
EQUAL, RATES_MEMBER = "equal settings", "{} rates"  # group; its member in contrasts of rates
KNOWN_BASE = ROUNDS_POPULATION + ", each base model's one score taken as known"
SETTING = ["objective", "dataset", "epochs"]
LABELS = {
    "study": original_study.ORIGINAL_NAME,
    "notebook": "20_original_study",
    "benchmark": original_study.BENCHMARK,
    "judge": original_study.JUDGE,
}
START_OF_DPO = math.log(
    2
)  # the DPO loss of the base model itself: -log sigmoid(0) (Rafailov et al. 2023, equation 7)

SHORT_NAMES = {
    "learning_rate_labelled": "labelled",
    "learning_rate_true": "rate",
    "utility_1_to_10": "utility",
    "final_eval_loss": "loss",
}


def frame(runs: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per run: settings with the labelled and the true rate, losses, safety, its change,
    and where it stands among equal runs.

    gain: by how much the held-out loss fell, percent of the base model's (for DPO, of ln 2, with
    which DPO starts). setting and pool say which runs differ by chance alone: equal base model,
    method and true settings. printed_change is the change as the package's tables round it: each
    run to two decimals, each base model to the mean of its categories' percentages at two decimals.
    One column per category holds the change of that category.
    """
    judged = original_tables.items(runs, verdicts)
    judged = judged.assign(safe=judged["safe"].fillna(False).astype(float))
    safe = judged.groupby("run_id")["safe"]
    names = dict(zip(runs["run"], original_tables.run_ids(runs), strict=True))
    base = original_study.base_counts()
    asked = original_study.PER_CATEGORY * base["category"].nunique()
    whole = 100 * base.groupby("base_model")["n_safe"].sum() / asked
    rows = runs.rename(columns=SHORT_NAMES)
    rows = rows.assign(
        run_id=rows["run"].map(names),
        no_op=original_tables.no_op(runs),
        base_loss=original_tables.base_loss(runs).mask(runs["objective"].eq("dpo"), START_OF_DPO),
    )
    rows = rows.assign(
        safety=100 * rows["run_id"].map(safe.mean()),
        gain=100 * (1 - rows["loss"] / rows["base_loss"]),
    )
    rows["change"] = rows["safety"] - rows["base_model"].map(whole)
    share = 100 / original_study.PER_CATEGORY
    printed = (share * base["n_safe"]).round(2).groupby(base["base_model"]).mean()
    rows["printed_change"] = rows["safety"].round(2) - rows["base_model"].map(printed)
    rows["setting"] = rows[[*SETTING, "rate"]].astype(str).agg(" ".join, axis=1)
    rows["pool"] = rows["base_model"] + " " + rows["method"]
    wide = {"columns": "category", "sort": False}
    categories = 100 * judged.pivot_table(index="run_id", values="safe", **wide)
    own = base.pivot(index="base_model", columns="category", values="n_safe")
    own = share * own[categories.columns]
    change = categories.loc[rows["run_id"]].to_numpy() - own.loc[rows["base_model"]].to_numpy()
    change = pd.DataFrame(change, index=rows.index, columns=categories.columns)
    return pd.concat([rows, change], axis=1)


# ---- contrasts of runs
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
        "population": ROUNDS_POPULATION,
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
                            member=RATES_MEMBER.format(kind),
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
        "population": ROUNDS_POPULATION,
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
        base_model=rows["base_model"].map(original_tables.short),
        text=[words(row) for row in rows.itertuples()],
    )
    return (
        frame.pivot(index=down, columns=across, values="text")
        .reindex(index=frame[down].unique(), columns=frame[across].unique())
        .rename_axis(None, axis=1)
    )
