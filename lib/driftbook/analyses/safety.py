"""Notebook 09: what training did to unsafe responses and refusals, by every run and cell."""

import pandas as pd

from driftbook.analyses import outcomes
from driftbook.benchmarks import verdict_counts
from driftbook.stats import comparisons, harm, influence, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.picking import in_words, picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, greedy


def asked(tables: Tables, every: bool = False) -> pd.DataFrame:
    """The verdicts on greedy answers (on `every` answer) with their `harm`, prompts and arms."""
    verdicts = harm.with_harm(tables.verdicts if every else greedy(tables.verdicts))
    arms = influence.arms(tables.variants, tables.runs)
    known = verdicts.merge(tables.prompts, on=["benchmark", "prompt_id"], validate="m:1")
    return known if every else known.merge(arms[["run_id", "base_model", "arm"]], on="run_id")


def scored(tables: Tables) -> pd.DataFrame:
    """By benchmark, kind, judge and base model: answers, and the share without verdict (without a
    judge: that neither refuse nor answer), without refusal reading, and incoherent."""
    by = asked(tables).groupby(["benchmark", "kind", "judge", "base_model"], sort=False)
    return by.agg(
        answers=("harm", "size"),
        unscored=("harm", lambda given: f"{given.isna().mean():.1%}"),
        refusal_unread=("refusal", lambda refusal: f"{refusal.isna().mean():.1%}"),
        incoherent=("coherent", lambda coherent: f"{(~coherent).mean():.1%}"),
    )


def safety_estimates(tables: Tables) -> pd.DataFrame:
    """Every estimate of notebook 09: unsafe responses by each judge (without a judge answers that
    do not refuse), refusals on harmful and on benign prompts, other wordings, drawn answers, and
    categories at a floor or ceiling."""
    names = {"study": tables.study.name, "notebook": "09_safety"}
    arms = influence.arms(tables.variants, tables.runs)
    cells, known = influence.cells(arms), asked(tables)
    parts = []
    harmful = known[known["kind"].eq("harmful")].groupby(["benchmark", "judge"], sort=False)
    for (benchmark, judge), rows in harmful:
        values = influence.matrix(rows, "harm", outcomes.UNITS)
        own = {"outcome": harm.of_judge(judge), "benchmark": benchmark, "judge": judge, **names}
        parts.append(outcomes.rate_estimates(values, arms, cells, **own))
    once = known[known["judge"].eq(known["judge"].iloc[0])]  # every judge sees the same refusals
    if tables.study.judges and tables.study.tests("not_refused"):
        rows = picked(once, benchmark="safety", kind="harmful")
        values = influence.matrix(rows.assign(harm=~harm.declined(rows)), "harm", outcomes.UNITS)
        own = {"outcome": terms.UNREFUSED, "benchmark": "safety", "judge": harm.DETECTOR, **names}
        parts.append(outcomes.rate_estimates(values, arms, cells, **own))
    for benchmark, kind in (("safety", "harmful"), ("over_refusal", "benign look-alike")):
        values = influence.matrix(
            picked(once, benchmark=benchmark, kind=kind), "refusal", outcomes.UNITS
        )
        own = {"outcome": terms.REFUSED, "benchmark": benchmark, "judge": harm.DETECTOR, **names}
        parts.append(outcomes.rate_estimates(values, arms, cells, **own))
    every = asked(tables, every=True)
    parts += [
        outcomes.of_ends(known, arms, cells, **names),
        outcomes.of_wordings(every, arms, cells, **names),
        outcomes.of_drawn(every, tables.variants, arms, cells, **names),
    ]
    return outcomes.completed(ESTIMATES.concat(parts))


def screened(estimates: pd.DataFrame) -> pd.DataFrame:
    """How many categories rise and fall at a false discovery rate of ALPHA, by method."""
    family = estimates["family_of_tests"].fillna("")
    found = estimates[family.str.startswith("screen") & estimates["p_adjusted"].lt(ALPHA)]
    found = found[found["base_model"].ne("all")]
    by = ["outcome", "benchmark", "judge", "base_model", "method"]
    counts = found.groupby(by, sort=False)["value"].agg(
        rise=lambda value: (value > 0).sum(), fall=lambda value: (value < 0).sum()
    )
    return counts.unstack("method", fill_value=0)


# ---- checks of the same findings
def safety_checks(tables: Tables, estimates: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{question: table}: what the unscored could hide, thresholds, drawn answers, wordings, a new
    base model, odds, and categories in which a rate can hardly move."""
    overall = estimates[estimates["base_model"].eq("all")]
    usual = picked(overall, group=terms.AS_CONFIGURED)
    worded = usual[usual["benchmark"].str.contains(", wording ")]
    other = picked(usual, contrast=[comparisons.ODDS, comparisons.DELTA_BASE])
    trained = picked(estimates, group=terms.TRAINED, benchmark=["safety", "over_refusal"])
    apart = picked(trained, contrast=comparisons.INTERACTION)
    apart = picked(apart, outcome=harm.safety_outcome(apart))
    ends = picked(overall, contrast=[terms.LOWEST, terms.HIGHEST], group=terms.TRAINED)
    bad = "unsafe" if tables.study.judges else "not refused"
    found = {
        "What could the unscored hide? All of them at either extreme": _wide(ends, "contrast"),
        "Does the judge's threshold decide? Unsafe share": _thresholds(tables),
        f"Do drawn answers say the same? `any`: at least one of the answers is {bad}": _drawn(
            tables
        ),
        "Does the wording decide?": _wide(picked(worded, contrast=terms.CHANGE), "method"),
        "What of a new base model?": picked(trained, contrast=comparisons.NEW_BASE)[
            ["outcome", "benchmark", "judge", "method", "value", "ci_low", "ci_high", "how"]
        ],
        "How far does each base model lie from their mean?": _wide(apart, "base_model"),
        "Odds ratios (1: no change) and Cliff's delta (0: no change)": _wide(other, "contrast"),
        "Where a rate is at an end, did the judge's logit move?": _wide(
            picked(estimates, outcome=outcomes.LOGIT), "method"
        ),
    }
    of_judges = ("Does the judge's", "Where a rate is at an end")
    judged = bool(tables.study.judges)
    return {ask: own for ask, own in found.items() if judged or not ask.startswith(of_judges)}


def _wide(rows: pd.DataFrame, columns: str) -> pd.DataFrame:
    """The estimates as text, with those columns of the key as index that are not alike in all."""
    names = ("outcome", "benchmark", "judge", "base_model", "category", "method")
    index = [name for name in names if name != columns and rows[name].nunique() > 1]
    return in_words(rows, index or ["outcome"], columns)


def _thresholds(tables: Tables) -> pd.DataFrame:
    """The unsafe share of each method at three thresholds of the judge's probability; empty without
    a judge."""
    rows = asked(tables).query("kind == 'harmful'")
    rows = rows[rows["judge"].ne(harm.DETECTOR)]
    rows = rows.merge(tables.variants[["run_id", "method"]], on="run_id")
    index = ["judge", "benchmark", "method"]
    shares = verdict_counts.at_thresholds(rows, index)
    return shares.pivot_table(index=index, columns="threshold", values="unsafe", sort=False)


def _drawn(tables: Tables) -> pd.DataFrame:
    """By way of decoding: the mean unsafe share of answers, the share of prompts with any unsafe
    answer, and the share unscored; without a judge of answers that do not refuse."""
    names = tables.variants[["run_id", "base_model", "method"]]
    rows = asked(tables, every=True).merge(names, on="run_id")
    rows = picked(rows, kind="harmful", prompt_variant="default")
    rows = rows.assign(harm=rows["harm"].astype("Float64"))
    rows["unscored"] = rows["harm"].isna().astype("Float64")
    by = ["judge", "benchmark", "base_model", "method", "decoding"]
    one = rows.groupby([*by, "run_id", "prompt_id"], sort=False).agg(
        harm=("harm", "mean"), any=("harm", "max"), unscored=("unscored", "mean")
    )
    judged = rows["judge"].ne(harm.DETECTOR).any()
    columns = ["unsafe" if judged else "not refused", "any", "unscored"]
    return one.groupby(by, sort=False).mean().set_axis(columns, axis=1)
