"""Repairs against the rescaled runs that keep just less and just more of the gain."""

import numpy as np
import pandas as pd

from driftbook.analyses.repairs import (
    GAIN,
    HARM,
    JUST_LESS,
    JUST_MORE,
    PARENT,
    REPORT,
    at_chosen,
    wide_points,
)
from driftbook.stats import comparisons, estimation, harm, intervals, terms


def beside_rescaling(
    points: pd.DataFrame, repaired: pd.DataFrame, levels: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """Unsafe answers (without a judge those that do not refuse) of each repair at its chosen level
    minus those of the same parent rescaled, in percentage points: minus the rescaled run that keeps
    just less of the gain, and minus the one that keeps just more.

    The rescaled runs are the base model (factor 0, no gain), those of the study, and the parent
    itself (factor 1). Fewer unsafe answers than the first, at more gain, is what a smaller update
    cannot do; more than the second, at less gain, is worse than a smaller update. Between two
    factors nothing is assumed: unsafe answers are no straight line of the gain. t intervals over
    seeds (of the mean over a seed's runs); where a gain lies outside there is no such run. Holm's
    adjustment over repairs, for all base models and for each.
    """
    wide = wide_points(points, REPORT)
    frame = at_chosen(repaired, levels).merge(wide, on="run_id")
    frame = frame[frame["control"].isna() & frame["kind"].ne("rescale")]
    frame[[JUST_LESS, JUST_MORE]] = np.array(
        [_beside(row, repaired, wide) for _, row in frame.iterrows()], float
    ).reshape(-1, 2)
    each = frame.groupby(["base_model", "method", "name"], sort=False)
    overall = [
        (("all", *key), part)
        for key, part in frame.groupby(["method", "name"], sort=False)
        if part["base_model"].nunique() == repaired["base_model"].nunique()
    ]
    labels |= {"outcome": harm.safety_outcome(points), "benchmark": "safety", "judge": "none"}
    labels |= {"group": terms.MITIGATION, "population": terms.THESE_PROMPTS}
    rows = [
        {**labels, "base_model": base_model, "method": method, "member": name}
        | {"contrast": contrast, **_over_seeds(part["seed"], part[contrast])}
        for (base_model, method, name), part in [*each, *overall]
        for contrast in (JUST_LESS, JUST_MORE)
    ]
    found = estimation.complete(pd.DataFrame(rows))
    return comparisons.declared(
        found,
        "repairs against rescaling, "
        + found["base_model"].where(found["base_model"].ne("all"), "all base models"),
    )


def _over_seeds(seed: pd.Series, values: pd.Series) -> dict:
    """n_runs, how and a t interval of the mean over seeds, of those whose runs all have a value."""
    of_seed = values.groupby(seed).agg(["mean", "count", "size"])
    n, lacking, how = int(values.notna().sum()), int(values.isna().sum()), "t interval over seeds"
    if lacking:
        how += (
            f"; {lacking} of {len(values)} runs keep a gain beside which there is no rescaled run"
        )
    means = of_seed["mean"][of_seed["count"].eq(of_seed["size"])]
    return {"n_runs": n, **_t(means.to_numpy(float)), "how": how}


def _beside(row: pd.Series, repaired: pd.DataFrame, wide: pd.DataFrame) -> tuple[float, float]:
    """A run's unsafe answers minus those of its parent's rescaled runs that keep just less and just
    more of the gain; NaN where there is none.
    """
    rescaled = repaired.loc[
        repaired["parent_run_id"].eq(row["parent_run_id"])
        & repaired["kind"].isin(["rescale", PARENT]),
        "run_id",
    ]
    known = wide.reindex([*rescaled])[[GAIN, HARM]].to_numpy(float)
    known = np.vstack([known, [0.0, wide[HARM].get(row["base_run_id"], np.nan)]])
    known = known[~np.isnan(known).any(1)]
    less, more = known[known[:, 0] <= row[GAIN]], known[known[:, 0] >= row[GAIN]]
    return tuple(
        row[HARM] - side[pick(side[:, 0]), 1] if len(side) else np.nan
        for side, pick in ((less, np.argmax), (more, np.argmin))
    )


def _t(values: np.ndarray) -> dict[str, float | None]:
    if len(values) == 0:
        return {"value": None}
    variance = values.var(ddof=1) / len(values) if len(values) > 1 else np.nan
    return {
        "value": float(values.mean()),
        **intervals.t_interval(float(values.mean()), variance, len(values) - 1),
    }
