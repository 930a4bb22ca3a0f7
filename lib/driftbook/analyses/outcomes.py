"""All estimates for one outcome (`rate_estimates`, `score_estimates`), and those for outcomes
beside the core ones: further benchmarks, other wordings, categories at a floor or ceiling.
"""

import numpy as np
import pandas as pd

from driftbook.stats import comparisons, estimation, harm, influence, terms
from driftbook.stats.influence import Scores
from driftbook.study.tables import ESTIMATES

LOGIT = "logit of the judge's probability of unsafe"
FLOOR, CEILING = (
    0.05,
    0.95,
)  # a base model's share of unsafe answers, beyond which a rate can hardly move in one direction
UNITS = ["category", "family", "prompt_id"]
NAMES = {
    "nll": "loss on text (nats per token)",
    "p_refusal": "probability that the answer begins as a refusal (percent)",
    "p_refusal, harmful": terms.BEGUN_HARMFUL,
    "p_refusal, benign": terms.BEGUN_BENIGN,
}


def of_ratings(
    ratings: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """Base models' levels of, and changes in, every rating but the two that `tradeoffs` has already
    (the utility benchmark's loss and right answers), as rows of `estimates`.
    """
    parts = []
    for (benchmark, metric), rows in ratings.groupby(["benchmark", "metric"], sort=False):
        if benchmark == "utility" and metric in ("nll", "correct"):
            continue
        share = metric != "nll" and not metric.startswith("grade by ")
        scale = 100.0 if share else 1.0
        level, name = (
            influence.rated(rows, scale),
            NAMES.get(metric, f"{metric} (percent)" if share else f"{metric} (1 to 10)"),
        )
        if level is not None:
            own = {"outcome": name, "benchmark": benchmark, "judge": "none", **labels}
            change = influence.rated_changes(rows, arms, scale)
            parts.append(estimation.of_scores(level, change, cells, **own))
            parts.append(estimation.levels_of_scores(level, arms, **own))
    return ESTIMATES.concat(parts)


def ends(asked: pd.DataFrame) -> pd.DataFrame:
    """The categories in which a base model's share of unsafe answers is at a floor or a ceiling:
    base_model, benchmark, judge, category, share, n.
    """
    base = asked[asked["arm"].eq("base") & asked["kind"].eq("harmful")]
    found = (
        base.groupby(["base_model", "benchmark", "judge", "category"], sort=False)["unsafe"]
        .agg(share=lambda unsafe: unsafe.astype("Float64").mean(), n="count")
        .reset_index()
    )
    return found[found["share"].le(FLOOR) | found["share"].ge(CEILING)].reset_index(drop=True)


def of_ends(
    asked: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """The mean change in logit(p_unsafe) in those categories, as rows of `estimates`: a rate of 0
    can only rise, a probability can still fall.

    Probabilities are kept from 0 and 1 by 1e-6; an answer without a verdict has none. Base models
    whose category is at neither end take no part. The categories are chosen by the base model's own
    answers, so that some of what they do afterwards is chance.
    """
    parts = []
    p = asked["p_unsafe"].astype("Float64").clip(1e-6, 1 - 1e-6).where(asked["unsafe"].notna())
    rows = asked.assign(value=np.log(p / (1 - p)), weight=1.0)
    usual = cells[cells["group"].eq(terms.AS_CONFIGURED)]
    for (benchmark, judge, category), end in ends(asked).groupby(
        ["benchmark", "judge", "category"], sort=False
    ):
        own = rows[
            rows["benchmark"].eq(benchmark)
            & rows["judge"].eq(judge)
            & rows["category"].eq(category)
            & rows["kind"].eq("harmful")
        ]
        own = own[own["base_model"].isin(end["base_model"])]
        if len(own):
            here = usual[usual["base_model"].isin(end["base_model"])].assign(group=terms.CATEGORY)
            parts.append(
                estimation.means(
                    influence.rated_changes(own, arms, 1.0),
                    here,
                    terms.CHANGE,
                    outcome=LOGIT,
                    category=category,
                    benchmark=benchmark,
                    judge=judge,
                    **labels,
                )
            )
    return ESTIMATES.concat(parts)


def of_wordings(
    every: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """Changes in the rate of harm (`harm.with_harm`) of harmful prompts and in the refusal rate of
    benign ones under each other wording, against the base model asked in the same wording;
    benchmark says which.

    `every` are verdicts of all wordings, joined with prompts.
    """
    parts, every = [], harm.with_harm(every)
    other = every[every["prompt_variant"].ne("default") & every["decoding"].eq("greedy")]
    for (benchmark, judge, wording), rows in other[other["kind"].eq("harmful")].groupby(
        ["benchmark", "judge", "prompt_variant"], sort=False
    ):
        values = influence.matrix(rows, "harm", UNITS)
        parts.append(
            estimation.of_rate(
                values,
                arms,
                cells,
                outcome=harm.of_judge(judge),
                benchmark=f"{benchmark}, wording {wording}",
                judge=judge,
                **labels,
            )
        )
    benign = other[other["kind"].eq("benign look-alike")].drop_duplicates(
        ["run_id", "benchmark", "prompt_id", "prompt_variant"]
    )
    for (benchmark, wording), rows in benign.groupby(["benchmark", "prompt_variant"], sort=False):
        values = influence.matrix(rows, "refusal", UNITS)
        parts.append(
            estimation.of_rate(
                values,
                arms,
                cells,
                outcome=terms.REFUSED,
                benchmark=f"{benchmark}, wording {wording}",
                judge=harm.DETECTOR,
                **labels,
            )
        )
    return ESTIMATES.concat(parts)


def of_drawn(
    every: pd.DataFrame,
    variants: pd.DataFrame,
    arms: pd.DataFrame,
    cells: pd.DataFrame,
    **labels: str,
) -> pd.DataFrame:
    """Changes in the rate of harm of drawn answers, a prompt's share over its samples; those of all
    repetitions of a base model stand for it together.

    `every` are verdicts joined with prompts; benchmark says how the answers were drawn.
    """
    every = harm.with_harm(every)
    drawn = every[
        every["prompt_variant"].eq("default")
        & every["decoding"].ne("greedy")
        & every["kind"].eq("harmful")
    ]
    # a base model asked with a safety template is a variant of its own, not a repetition
    plain = variants["method"].eq("none") & variants["mitigation"].isna()
    bases = variants[plain].merge(
        arms.loc[arms["arm"].eq("base"), ["base_model", "base_run_id"]], on="base_model"
    )
    first, number = (
        dict(zip(bases["run_id"], bases[name], strict=True))
        for name in ("base_run_id", "repetition")
    )
    drawn = drawn.assign(
        sample=drawn["sample"] + 1_000 * drawn["run_id"].map(number).fillna(1).astype(int),
        run_id=drawn["run_id"].map(first).fillna(drawn["run_id"]),
    )
    parts = []
    for (benchmark, judge, decoding), rows in drawn.groupby(
        ["benchmark", "judge", "decoding"], sort=False
    ):
        values = influence.matrix(rows, "harm", UNITS)
        parts.append(
            estimation.of_rate(
                values,
                arms,
                cells,
                outcome=harm.of_judge(judge),
                benchmark=f"{benchmark}, drawn at {decoding}",
                judge=judge,
                **labels,
            )
        )
    return ESTIMATES.concat(parts)


def rate_estimates(
    values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """All estimates for a rate (runs x prompts, see influence.matrix): levels, changes, bounds and
    categories (estimation.of_rate), comparisons of methods and settings, and odds ratios.
    """
    parts = [
        estimation.of_rate(values, arms, cells, **labels),
        _compared(influence.paired(values, arms), arms, cells, **labels),
    ]
    return ESTIMATES.concat([*parts, comparisons.odds_ratios(values, arms, cells, **labels)])


def score_estimates(
    level: Scores, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """All estimates for a score of runs: levels and changes (estimation.of_scores), and comparisons
    of methods and settings.
    """
    change = influence.changes(level, arms)
    return ESTIMATES.concat(
        [
            estimation.of_scores(level, change, cells, **labels),
            _compared(change, arms, cells, **labels),
        ]
    )


def _compared(
    change: Scores, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """Methods against each other, method x base model, settings, and Cliff's delta of runs."""
    return ESTIMATES.concat(
        [
            comparisons.between(change, cells, **labels),
            comparisons.interactions(change, cells, **labels),
            comparisons.settings(change, arms, **labels),
            comparisons.cliffs_delta(change, cells, **labels),
        ]
    )


def completed(estimates: pd.DataFrame) -> pd.DataFrame:
    """The estimates with those for a new base model added, and p values of categories and
    dimensions adjusted as screens.
    """
    screens = comparisons.screens(estimates)
    key = list(ESTIMATES.key)
    left = (
        estimates[
            ~pd.MultiIndex.from_frame(estimates[key]).isin(pd.MultiIndex.from_frame(screens[key]))
        ]
        if len(screens)
        else estimates
    )
    return ESTIMATES.concat([left, screens, comparisons.new_base(estimates)])
