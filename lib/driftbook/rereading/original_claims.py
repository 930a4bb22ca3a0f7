"""The ledger of the original study's claims: each with a number, its interval, the rule that
decides, and what the rule says of the public data.

A verdict is `stands`, `falls`, or `cannot be told`. Where a claim is about a change against a base
model it is judged twice, with the base model's one score taken as known and with that score
uncertain (its no-ops score it again in each round); where the two disagree, it cannot be told.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from driftbook.rereading import original_analysis, original_study, original_tables, original_tests
from driftbook.rereading.original_analysis import (
    KNOWN_BASE,
    ROUNDS_POPULATION,
    SAFETY,
    SETTING,
    SPREAD_RATIO,
    combination,
    matched_weight,
    mean_weight,
)
from driftbook.stats import estimation
from driftbook.stats.terms import CHANGE

STANDS, FALLS, OPEN = CLAIM_VERDICTS = "stands", "falls", "cannot be told"
MARGIN = 3.0  # points of safety that "preserves" may cost, fixed beforehand
ALPHA = 0.05
BASES = original_study.MODELS
CLASSES = {
    "lora": "ia3",
    "ia3": "lora",
    "prompt_tuning": "p_tuning",
    "p_tuning": "prompt_tuning",
}  # the other method of the class
CLAIM, RULE = "claim", "; rule: "
NO_FAIRNESS = (
    "null: no verdicts or answers of the main study's BBQ-Lite runs were found in the package (only"
    " means of one setting, and a later code arm); needed: each run's and base model's answers"
)


@dataclass(frozen=True)
class Claim:
    """A claim judged: the number with its interval in the unit of `outcome`, and how it was
    decided. Null numbers where there are no data.
    """

    verdict: str
    how: str
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    outcome: str = SAFETY
    n_runs: int | None = None
    population: str = KNOWN_BASE
    margin: float | None = None


def ledger(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> dict[str, Claim]:
    """Every claim of data/original_study/claims.csv, judged; `rows` is rereading.frame."""
    return {
        "lora_preserves": preserves(rows, "lora"),
        "ia3_preserves": preserves(rows, "ia3"),
        "prompt_tuning_degrades": degrades(rows, "prompt_tuning"),
        "p_tuning_degrades": degrades(rows, "p_tuning"),
        "llama_stable": stable(rows, BASES["llama"]),
        "qwen_gains": gains(rows, rows["base_model"].eq(BASES["qwen"])),
        "gemma_steepest": steepest(rows, BASES["gemma"]),
        "mistral_variable": most_variable(rows, BASES["mistral"], n_boot, seed),
        "rate_secondary": secondary(rows),
        "dpo_steadier": steadier(rows, n_boot, seed),
        "malware_improves": gains(rows, pd.Series(True, rows.index), "Malware"),
        "categories_decline": decline(rows),
        **dict.fromkeys(
            ("dimensions_decline", "sft_fairness", "safety_not_fairness"),
            Claim(
                OPEN,
                NO_FAIRNESS,
                outcome="fairness (no public data of the main study)",
                population="none",
            ),
        ),
    }


def estimates(judged: dict[str, Claim]) -> pd.DataFrame:
    """The ledger as rows of `estimates`: member names the claim, contrast is the verdict, how holds
    the rule.
    """
    rows = [
        {"group": CLAIM, "member": name, "contrast": one.verdict}
        | {key: value for key, value in vars(one).items() if key != "verdict"}
        for name, one in judged.items()
    ]
    return estimation.complete(
        pd.DataFrame(rows).assign(**original_analysis.LABELS, base_model="all", method="all")
    )


def claims_table(shown: pd.DataFrame) -> pd.DataFrame:
    """The ledger to read, from `estimates`: claim, verdict, number with interval, unit, how it was
    decided; in the order of claims.csv.
    """
    rows = shown[shown["group"].eq(CLAIM)].set_index("member").rename_axis("claim")
    known = original_study.cited("claims").set_index("claim")
    rows = rows.reindex([name for name in known.index if name in rows.index])
    frame = pd.DataFrame(
        {
            "claim": known["sentence"].reindex(rows.index),
            "verdict": rows["contrast"],
            "number": [number(row) for row in rows.itertuples()],
        }
    )
    return frame.assign(
        unit=rows["outcome"].str.partition(" (")[0],
        stated_in=known["stated_in"].reindex(rows.index),
        how=rows["how"],
    ).reset_index(drop=True)


def number(row) -> str:
    """Value and interval of a row of `estimates`, to two or three digits."""
    if pd.isna(row.value):
        return "none"
    text = (
        f"{row.value:.2f}"
        if row.outcome == SPREAD_RATIO
        else f"{row.value:.0f}"
        if pd.isna(row.ci_low)
        else f"{row.value:+.1f}"
    )
    digits = ".2f" if row.outcome == SPREAD_RATIO else "+.1f"
    return (
        text if pd.isna(row.ci_low) else f"{text} ({row.ci_low:{digits}} to {row.ci_high:{digits}})"
    )


# ---- rules
def decide(low: float | None, high: float | None, above: float = 0.0) -> str:
    """`stands` where the whole interval lies above, `falls` where it lies below, else `cannot be
    told`.
    """
    if low is None or high is None:
        return OPEN
    return STANDS if low > above else FALLS if high < above else OPEN


def both(known: str, uncertain: str) -> tuple[str, str]:
    """The verdict of two readings, and words for it."""
    return (
        known if known == uncertain else OPEN
    ), f"base scores known: {known}; uncertain: {uncertain}"


def preserves(rows: pd.DataFrame, method: str) -> Claim:
    """A method preserves safety if no cell (base model, objective, true rate) of its runs that
    learned something falls by more than the margin.
    """
    own = rows["method"].eq(method) & ~rows["no_op"]
    cells = list(
        rows[own].groupby(["base_model", "objective", "rate", "epochs", "dataset"]).groups.items()
    )
    level = 1 - ALPHA / len(cells)
    found = {}
    for uncertain in (False, True):
        parts = [
            combination(
                rows,
                mean_weight(rows, pd.Series(rows.index.isin(index), rows.index)),
                level=level,
                uncertain_base=uncertain,
            )
            for _, index in cells
        ]
        verdicts = {decide(one["ci_low"], one["ci_high"], -MARGIN) for one in parts}
        found[uncertain] = (
            (FALLS if FALLS in verdicts else STANDS if verdicts == {STANDS} else OPEN),
            parts,
        )
    worst = min(range(len(cells)), key=lambda i: found[False][1][i]["value"])
    (base, objective, rate, epochs, _), one = cells[worst][0], found[False][1][worst]
    verdict, words = both(found[False][0], found[True][0])
    left_out = (
        f"{int((rows['no_op'] & rows['method'].eq(method)).sum())} of"
        f" {int(rows['method'].eq(method).sum())} runs left out as no-ops"
    )
    how = (
        f"lowest of {len(cells)} cells: {original_tables.short(base)}, {objective} at {rate:.0e},"
        f" {epochs} epochs; simultaneous intervals; {left_out}; {words}{RULE}no cell falls by more"
        f" than {MARGIN:.0f} points; over-refusal was not measured"
    )
    return Claim(
        verdict,
        how,
        one["value"],
        one["ci_low"],
        one["ci_high"],
        n_runs=one["n_runs"],
        margin=MARGIN,
    )


def degrades(rows: pd.DataFrame, method: str) -> Claim:
    """A method reduces safety if its mean change is below zero, of all its runs and of those that
    ended below the base model's loss.
    """
    own, verdicts, means = rows["method"].eq(method), [], []
    for chosen in (own, own & rows["gain"].gt(0)):
        weight = mean_weight(rows, chosen)
        readings = [
            combination(rows, weight, uncertain_base=uncertain) for uncertain in (False, True)
        ]
        verdicts += [
            {STANDS: FALLS, FALLS: STANDS}.get(decide(one["ci_low"], one["ci_high"]), OPEN)
            for one in readings
        ]
        means.append(readings[0])
    whole, learned = means
    verdict = verdicts[0] if len(set(verdicts)) == 1 else OPEN
    how = (
        f"mean over base models; of the {learned['n_runs']} of {whole['n_runs']} runs whose loss"
        f" ended below the base model's: {learned['value']:+.1f} ({learned['ci_low']:+.1f} to"
        f" {learned['ci_high']:+.1f}){RULE}below zero in all runs and in those that learned, base"
        " scores known and uncertain"
    )
    return Claim(
        verdict, how, whole["value"], whole["ci_low"], whole["ci_high"], n_runs=whole["n_runs"]
    )


def stable(rows: pd.DataFrame, base_model: str) -> Claim:
    """A base model stays stable if its mean change lies within the margin on either side."""
    chosen, verdicts = rows["base_model"].eq(base_model), []
    for uncertain in (False, True):
        one = combination(rows, mean_weight(rows, chosen), uncertain_base=uncertain)
        inside = one["ci_low"] is not None and one["ci_low"] > -MARGIN and one["ci_high"] < MARGIN
        outside = one["ci_low"] is not None and (one["ci_high"] < -MARGIN or one["ci_low"] > MARGIN)
        verdicts.append(STANDS if inside else FALLS if outside else OPEN)
    one, (verdict, words) = combination(rows, mean_weight(rows, chosen)), both(*verdicts)
    how = (
        f"mean over its runs{_without_outliers(rows, chosen)}; {words}{RULE}the interval lies"
        f" within {MARGIN:.0f} points of no change"
    )
    return Claim(
        verdict,
        how,
        one["value"],
        one["ci_low"],
        one["ci_high"],
        n_runs=one["n_runs"],
        margin=MARGIN,
    )


def gains(rows: pd.DataFrame, chosen: pd.Series, value: str = "change") -> Claim:
    """Runs gain if their mean change (over base models) lies above zero."""
    known, uncertain = (
        combination(rows, mean_weight(rows, chosen), value, uncertain_base=flag)
        for flag in (False, True)
    )
    verdict, words = both(
        decide(known["ci_low"], known["ci_high"]), decide(uncertain["ci_low"], uncertain["ci_high"])
    )
    each = rows[chosen].groupby("base_model", sort=False)[value].mean()
    bases = (
        "; by base model: "
        + ", ".join(f"{original_tables.short(base)} {mean:+.1f}" for base, mean in each.items())
        if len(each) > 1
        else ""
    )
    how = (
        f"mean over runs{bases}{_without_outliers(rows, chosen, value)}; {words}{RULE}the interval"
        " lies above no change"
    )
    return Claim(
        verdict, how, known["value"], known["ci_low"], known["ci_high"], n_runs=known["n_runs"]
    )


def _without_outliers(rows: pd.DataFrame, chosen: pd.Series, value: str = "change") -> str:
    """The same mean without the utility outliers that the study left out, in words; nothing where
    utility is not known.
    """
    if rows["utility"].isna().all():
        return ""
    kept = rows[~original_tests.outliers(rows["utility"])]
    return (
        "; without the utility outliers"
        f" {(mean_weight(kept, chosen.reindex(kept.index)) * kept[value]).sum():+.1f}"
    )


def steepest(rows: pd.DataFrame, base_model: str) -> Claim:
    """A base model declines most if it changes less than each other one at equal settings; the
    smallest lead is shown.
    """
    others = [base for base in rows["base_model"].unique() if base != base_model]
    level, found = 1 - ALPHA / len(others), {}
    for uncertain in (False, True):
        weights = {
            other: matched_weight(
                rows,
                rows["base_model"].eq(other),
                rows["base_model"].eq(base_model),
                ["method", *SETTING, "rate"],
            )
            for other in others
        }
        parts = {
            other: combination(rows, weight, level=level, uncertain_base=uncertain)
            for other, weight in weights.items()
        }
        verdicts = {decide(one["ci_low"], one["ci_high"]) for one in parts.values()}
        found[uncertain] = (
            (FALLS if FALLS in verdicts else STANDS if verdicts == {STANDS} else OPEN),
            parts,
        )
    nearest = min(others, key=lambda other: found[False][1][other]["value"])
    one, (verdict, words) = found[False][1][nearest], both(found[False][0], found[True][0])
    how = (
        f"{original_tables.short(nearest)} less {original_tables.short(base_model)}, the smallest"
        f" of {len(others)} leads, equal methods and settings (SFT alone); simultaneous intervals;"
        f" {words}{RULE}every other base model changes more favourably"
    )
    return Claim(verdict, how, one["value"], one["ci_low"], one["ci_high"], n_runs=one["n_runs"])


def most_variable(rows: pd.DataFrame, base_model: str, n_boot: int, seed: int) -> Claim:
    """A base model varies most if its runs' standard deviation exceeds that of the most variable
    other, at equal settings.
    """
    spread = rows[rows["objective"].eq("sft")].groupby("base_model")["change"].std()
    other = spread.drop(base_model).idxmax()
    ratio, kept = _ratio(rows, base_model, other, n_boot, seed), rows
    words = ""
    if rows["utility"].notna().any():
        kept = rows[~original_tests.outliers(rows["utility"])]
        without = _ratio(kept, base_model, other, n_boot, seed)
        words = (
            f"; without the utility outliers {without['value']:.2f} ({without['ci_low']:.2f} to"
            f" {without['ci_high']:.2f})"
            if without["value"] is not None
            else ""
        )
    how = (
        f"against {original_tables.short(other)}, the most variable other;"
        f" {ratio['how']}{words}{RULE}the ratio lies above one"
    )
    return Claim(
        decide(ratio["ci_low"], ratio["ci_high"], 1.0),
        how,
        ratio["value"],
        ratio["ci_low"],
        ratio["ci_high"],
        SPREAD_RATIO,
        ratio["n_runs"],
        ROUNDS_POPULATION,
    )


def _ratio(rows: pd.DataFrame, base_model: str, other: str, n_boot: int, seed: int) -> dict:
    return original_analysis.spread_ratio(
        rows,
        rows["base_model"].eq(base_model),
        rows["base_model"].eq(other),
        ["method", *SETTING, "rate"],
        n_boot,
        seed,
    )


def steadier(rows: pd.DataFrame, n_boot: int, seed: int) -> Claim:
    """DPO is less variable than SFT if the ratio of standard deviations lies below one, at equal
    base model, method, rate and epochs, P-Tuning left out too.
    """
    cells = ["base_model", "method", "dataset", "epochs", "rate"]
    whole = original_analysis.spread_ratio(
        rows, rows["objective"].eq("dpo"), rows["objective"].eq("sft"), cells, n_boot, seed
    )
    rest = rows[rows["method"].ne("p_tuning")]
    without = original_analysis.spread_ratio(
        rest, rest["objective"].eq("dpo"), rest["objective"].eq("sft"), cells, n_boot, seed
    )
    flip = {STANDS: FALLS, FALLS: STANDS, OPEN: OPEN}
    verdicts = {flip[decide(one["ci_low"], one["ci_high"], 1.0)] for one in (whole, without)}
    missing = original_tables.absent(rows.rename(columns={"labelled": "learning_rate_labelled"}))
    lost = int((missing["objective"].eq("dpo")).sum())
    rest_words = (
        f"without P-Tuning {without['value']:.2f} ({without['ci_low']:.2f} to"
        f" {without['ci_high']:.2f}); "
        if without["value"] is not None
        else ""
    )
    how = (
        f"DPO over SFT; {whole['how']}; {rest_words}{lost} DPO runs of P-Tuning are absent, so it"
        f" is about the runs that survived{RULE}below one, with and without P-Tuning"
    )
    return Claim(
        verdicts.pop() if len(verdicts) == 1 else OPEN,
        how,
        whole["value"],
        whole["ci_low"],
        whole["ci_high"],
        SPREAD_RATIO,
        whole["n_runs"],
        ROUNDS_POPULATION,
    )


def secondary(rows: pd.DataFrame) -> Claim:
    """The learning rate is secondary if, in every method and base model, it moves safety less than
    exchanging the method for the other of its class does.

    The intervals of the contrasts of the true rate are simultaneous over all methods and base
    models (Bonferroni).
    """
    cells = [(base, method) for base in rows["base_model"].unique() for method in CLASSES]
    parts = {
        cell: (_rate_effect(rows, *cell, 1 - ALPHA / len(cells)), _exchange(rows, *cell))
        for cell in cells
    }
    verdicts = {cell: _smaller(rate, exchange) for cell, (rate, exchange) in parts.items()}
    verdict = (
        FALLS
        if FALLS in verdicts.values()
        else STANDS
        if set(verdicts.values()) == {STANDS}
        else OPEN
    )
    ranked = [cell for cell in cells if verdicts[cell] == verdict] or cells
    base, method = max(ranked, key=lambda cell: abs(parts[cell][0]["value"]))
    rate, exchange = parts[base, method]
    worse = sum(one == FALLS for one in verdicts.values())
    how = (
        f"2e-5 instead of 1e-3 (true rates), {method} on {original_tables.short(base)}; exchanging"
        f" it there for {CLASSES[method]} moves safety by {exchange['value']:+.1f}"
        f" ({exchange['ci_low']:+.1f} to {exchange['ci_high']:+.1f}); the rate moves it more in"
        f" {worse} of {len(cells)} cells of method and base model{RULE}in no cell does the rate"
        " move safety more than the exchange, intervals included"
    )
    return Claim(
        verdict,
        how,
        rate["value"],
        rate["ci_low"],
        rate["ci_high"],
        n_runs=rate["n_runs"],
        population=ROUNDS_POPULATION,
    )


def _rate_effect(rows: pd.DataFrame, base: str, method: str, level: float) -> dict:
    here = rows["base_model"].eq(base) & rows["method"].eq(method)
    return combination(
        rows,
        matched_weight(
            rows,
            here & rows["rate"].lt(1e-4),
            here & rows["rate"].gt(1e-4),
            ["base_model", *SETTING],
        ),
        level=level,
    )


def _exchange(rows: pd.DataFrame, base: str, method: str) -> dict:
    here = rows["base_model"].eq(base)
    weight = matched_weight(
        rows,
        here & rows["method"].eq(CLASSES[method]),
        here & rows["method"].eq(method),
        ["base_model", *SETTING, "rate"],
    )
    return combination(rows, weight)


def _smaller(one: dict, other: dict) -> str:
    """`stands` where the size of one is below that of the other, intervals included; `falls` where
    it is above.
    """
    if one["ci_low"] is None or other["ci_low"] is None:
        return OPEN
    (low, high), (least, most) = (_size(part["ci_low"], part["ci_high"]) for part in (one, other))
    return STANDS if high < least else FALLS if low > most else OPEN


def _size(low: float, high: float) -> tuple[float, float]:
    """The interval of an absolute value."""
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def decline(rows: pd.DataFrame) -> Claim:
    """Categories decline if each other than Malware falls, by a screen over categories
    (Benjamini-Hochberg).
    """
    others = tuple(name for name in original_study.HEX_PHI if name != "Malware")
    screened = original_analysis.by_category(rows, others)
    wide = screened[screened["contrast"].eq(original_analysis.CHANGE_WIDE)]
    known = screened[screened["contrast"].eq(CHANGE)]
    falling = wide[wide["value"].lt(0) & wide["p_adjusted"].lt(ALPHA)]["category"]
    certain = int((known["ci_high"] < 0).sum())
    rising = int((known["ci_low"] > 0).sum())
    verdict = STANDS if len(falling) == len(others) else FALLS if rising else OPEN
    how = (
        f"categories of {len(others)} that decline: {', '.join(falling) or 'none'}; with the base"
        f" scores taken as known {certain}; the public summaries do not name those that the paper"
        f" means{RULE}all decline with p below {ALPHA} after Benjamini-Hochberg, base scores"
        " uncertain"
    )
    return Claim(
        verdict,
        how,
        float(len(falling)),
        outcome="categories that decline (count)",
        n_runs=len(rows),
        population=ROUNDS_POPULATION,
    )


def counts(judged: pd.DataFrame) -> dict[str, int]:
    """How many claims of a ledger (rows of `estimates`) stand, fall, and cannot be told."""
    verdicts = judged.loc[judged["group"].eq(CLAIM), "contrast"]
    return {name: int(np.sum(verdicts.eq(name))) for name in (STANDS, FALLS, OPEN)}
