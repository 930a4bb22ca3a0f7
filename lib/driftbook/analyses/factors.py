"""Which factor moves a run: the largest contrast of each factor within a method beside the largest
between methods, and shares of the variance.

A factor is called "secondary" from contrasts, not from shares: a share depends on the levels that
were tried, and a main effect hides effects that are opposite in two methods. Every contrast here
compares cells that differ in one factor alone, so that grids of any shape can be read.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from driftbook.stats.confidence import ALPHA, CONFIDENCE
from driftbook.stats.estimation import complete
from driftbook.stats.terms import MIXED_IN

FACTORS = {
    "learning_rate": "learning rate",
    "objective": "objective",
    "epochs": "epochs",
    "dataset": "dataset",
    "init": "init",
    "repetition": "repetition",
}
SETTINGS = tuple(FACTORS)[
    :-1
]  # runs that share base model, method and these are repetitions of one cell
METHOD, SEED, FACTOR = "method", "seed", "factor"
SHARED = {"base_model": "base model", "method": METHOD} | {
    name: FACTORS[name] for name in SETTINGS if name != "init"
}
NONE = "none"  # the level of a factor that a run does not have
CELL, MEAN = "cell", "mean over matched cells"
WITHIN, BETWEEN = (
    "largest contrast within a method",
    "largest contrast between methods at equal settings",
)
EXCESS = "largest contrast within a method less the largest between methods"
SECONDARY, NOT_SECONDARY, CANNOT_TELL = "secondary", "not secondary", "cannot tell"
POPULATION = "seeds like these, these prompts, these base models and settings"


# ---- runs and their cells
def factor_runs(arms: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """The trained runs, no-ops and other inits among them, with their factors and `value` (by
    run_id); controls, repairs and runs that are only mixed into others are left out.

    Raises:
        ValueError: runs of one cell differ in a setting that is no factor here, so that they are no
            repetitions of each other.
    """
    frame = arms[arms["objective"].isin(["sft", "dpo"]) & arms["mitigation"].isna()]
    frame = frame[frame["arm"].ne(MIXED_IN)]
    mixed = (
        frame.groupby(["base_model", "method", *SETTINGS], dropna=False)["settings"].nunique().gt(1)
    )
    if mixed.any():
        raise ValueError(
            f"{mixed.sum()} cells hold runs with different other settings, first {mixed.idxmax()};"
            " analyse them apart"
        )
    return frame[["run_id", "base_model", "method", *FACTORS]].merge(
        values.rename("value"), left_on="run_id", right_index=True
    )


def checked_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that have a value, with every factor; null levels are the level `none`.

    Raises:
        ValueError: a needed column is missing, a run stands twice, or no run has a value.
    """
    missing = {"run_id", "base_model", "method", "value"} - set(runs)
    if missing:
        raise ValueError(f"runs without the columns {sorted(missing)}")
    if runs["run_id"].duplicated().any():
        raise ValueError(
            f"{runs['run_id'].duplicated().sum()} runs stand twice, first"
            f" {runs.loc[runs['run_id'].duplicated(), 'run_id'].iloc[0]}"
        )
    frame = runs.reindex(columns=["run_id", "base_model", "method", *FACTORS, "value"]).astype(
        object
    )
    frame = frame[frame["value"].notna()].reset_index(drop=True)
    if frame.empty:
        raise ValueError("no run has a value: there is nothing to compare")
    return frame.where(frame.notna(), NONE).astype({"value": float})


def cell_codes(frame: pd.DataFrame, names: Sequence[str] = SETTINGS) -> np.ndarray:
    """The number of each run's cell: base model, method and settings."""
    return frame.groupby(["base_model", "method", *names], sort=False).ngroup().to_numpy()


def usual_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with their method's usual init, which is the one most of its runs have: an init
    cannot be equal between methods.
    """
    usual = frame.groupby("method")["init"].agg(lambda init: init.value_counts().index[0])
    return frame[frame["init"].eq(frame["method"].map(usual))]


def partner_factors(frame: pd.DataFrame, factor: str, names: Sequence[str]) -> list[str]:
    """The other factors that change only together with this one, level by level, so that no data
    can tell them apart.
    """
    levels = {name: frame[name].tolist() for name in {factor, *names}}
    n = {name: len(set(values)) for name, values in levels.items()}
    return [
        name
        for name in names
        if name != factor
        and len(set(zip(levels[factor], levels[name], strict=True))) == n[factor] == n[name] > 1
    ]


def never_run(runs: pd.DataFrame) -> pd.DataFrame:
    """The cells that were run on some base models and not on others: method, setting, and the base
    models they are missing on.
    """
    frame = checked_runs(runs).assign(
        setting=lambda rows: [
            _words(zip(SETTINGS, row, strict=True))
            for row in rows[list(SETTINGS)].itertuples(index=False)
        ]
    )
    bases = frame["base_model"].unique()
    had = frame.groupby(["method", "setting"], sort=False)["base_model"].unique()
    missing = had.map(lambda own: ", ".join(base for base in bases if base not in set(own)))
    return missing[missing.ne("")].rename("never_run_on").reset_index()


def run_variance(runs: pd.DataFrame) -> pd.DataFrame:
    """Variance between runs with equal settings, by method, pooled over its cells with its df; null
    where no cell was repeated.
    """
    frame = checked_runs(runs)
    rest = frame["value"] - frame["value"].groupby(cell_codes(frame)).transform("mean")
    parts = pd.DataFrame(
        {"method": frame["method"], "cell": cell_codes(frame), "square": rest**2}
    ).groupby("method", sort=False)
    df = parts.size() - parts["cell"].nunique()
    return pd.DataFrame({"variance": parts["square"].sum() / df.where(df > 0), "df": df})


# ---- contrasts of matched cells
def matched_contrasts(
    runs: pd.DataFrame, grain: str = CELL, n_draws: int = 4000, seed: int = 0
) -> pd.DataFrame:
    """Every difference of two cells that differ in one factor alone, and every difference of two
    methods in equal cells.

    `runs` has run_id, base_model, method, the FACTORS (those it lacks are taken as equal) and
    value. Grain `cell`: a row is a pair of cells of one base model; `mean over matched cells`:
    those with the same levels are averaged over base models and other settings, so that opposite
    effects cancel. Repetitions are compared over all settings of a base model at least.

    Columns: factor (or `method`), method (`all` between methods), base_model, setting (what is
    equal), first, second, value (second less first, in units of value), se, df, ci_low, ci_high,
    n_runs, grain; df is Satterthwaite's (1946). The variance of runs is each cell's own where
    contrasts are means, and each method's own, pooled over its cells, where they are of single
    cells: with three runs a cell, own variances leave no single contrast a usable interval (four df
    or fewer at a critical p value near 0.0003). So the intervals of means hold whatever the
    variances, and those of single cells only as far as the cells of a method vary alike: simulated
    with 3 repetitions, all rows of grain `mean over matched cells` were covered in 96 % of sets or
    more, all of grain `cell` in 95 % where cells were alike and in 60 to 80 % where some of them
    varied three or more times as much as the others. The interval is simultaneous over all rows, so
    that it holds for the largest of them: the critical p value is the 5 % quantile of the smallest
    p value of all rows when nothing differs, drawn from their joint t distribution (min-p; Westfall
    & Young 1993, Hothorn, Bretz & Westfall 2008). Rows of a method without repetitions, or whose
    repetitions are all alike, have no se and no interval.
    """
    frame = checked_runs(runs)
    table, weights = _averaged(*_pairs(frame), grain)
    return pd.concat([table, _band(frame, weights, grain == CELL, n_draws, seed)], axis=1).assign(
        grain=grain
    )


def _pairs(frame: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Names of the contrasts, and their weights over the runs."""
    rows = []
    for method, own in frame.groupby("method", sort=False):
        for factor in FACTORS:
            partners = partner_factors(own, factor, SETTINGS) if factor in SETTINGS else []
            if not any(
                SETTINGS.index(name) < SETTINGS.index(factor) for name in partners
            ):  # else its partner speaks for both
                same = [
                    "base_model",
                    *(name for name in SETTINGS if name not in (factor, *partners)),
                ]
                rows += _of_factor(
                    own,
                    factor,
                    same,
                    factor=" and ".join(FACTORS[name] for name in (factor, *partners)),
                    method=method,
                )
    rows += _of_factor(
        usual_runs(frame),
        "method",
        ["base_model", *(name for name in SETTINGS if name != "init")],
        factor=METHOD,
        method="all",
    )
    table = pd.DataFrame(
        rows,
        columns=["factor", "method", "base_model", "setting", "first", "second", "minus", "plus"],
    )
    weights = np.zeros((len(table), len(frame)))
    for row, minus, plus in zip(weights, table["minus"], table["plus"], strict=True):
        row[plus], row[minus] = 1 / len(plus), -1 / len(minus)
    return table.drop(columns=["minus", "plus"]), weights


def _of_factor(frame: pd.DataFrame, column: str, same: list[str], **names: str) -> list[dict]:
    """A row per pair of levels of the column, wherever all of `same` are equal; minus and plus are
    the positions of their runs.
    """
    cells: dict[tuple, dict] = {}
    for position, level, *key in frame[[column, *same]].itertuples(name=None):
        cells.setdefault(tuple(key), {}).setdefault(level, []).append(position)
    return [
        {
            **names,
            "base_model": key[0],
            "setting": _words(zip(same[1:], key[1:], strict=True)),
            "first": _word(column, first),
            "second": _word(column, second),
            "minus": levels[first],
            "plus": levels[second],
        }
        for key, levels in cells.items()
        for first, second in combinations(ordered_levels(levels), 2)
    ]


def ordered_levels(levels: Iterable) -> list:
    """Numbers by size, then names."""
    return sorted(levels, key=lambda level: (isinstance(level, str), level))


def _words(setting: Iterable[tuple[str, object]]) -> str:
    """A setting in words; levels that a run does not have are left out."""
    return ", ".join(_word(name, level) for name, level in setting if level != NONE)


def _word(factor: str, level) -> str:
    before, after = {
        "learning_rate": ("rate ", ""),
        "epochs": ("", " ep"),
        "repetition": ("repetition ", ""),
    }.get(factor, ("", ""))
    return str(level) if isinstance(level, str) else f"{before}{level:g}{after}"


def _averaged(
    table: pd.DataFrame, weights: np.ndarray, grain: str
) -> tuple[pd.DataFrame, np.ndarray]:
    """The contrasts as the grain asks: those of a factor, method and pair of levels averaged, or
    each for itself.

    Repetitions are averaged over settings at either grain: what two single runs differ by is the
    noise of seeds, not a drift between repetitions.
    """
    keys = table[["factor", "method", "first", "second"]]
    if grain == CELL:
        keys = keys.assign(
            base_model=table["base_model"],
            setting=table["setting"].where(table["factor"].ne(FACTORS["repetition"]), ""),
        )
    groups = table.groupby([keys[name] for name in keys], sort=False)
    code = groups.ngroup().to_numpy()
    mean = np.eye(groups.ngroups)[:, code] / np.bincount(code)[:, None] @ weights
    first = groups.head(1).reset_index(drop=True)
    size, bases = groups.size().to_numpy(), groups["base_model"].nunique().to_numpy()
    setting = first["setting"].where(
        size == 1, pd.Series(size).map("mean of {} matched pairs".format)
    )
    return (
        first.assign(
            base_model=first["base_model"].where(bases == 1, "all"),
            setting=setting,
            n_runs=(mean != 0).sum(1),
        ),
        mean,
    )


def _band(
    frame: pd.DataFrame, weights: np.ndarray, pooled: bool, n_draws: int, seed: int
) -> pd.DataFrame:
    """value, se, df and the simultaneous interval of each row of weights over the runs."""
    (group, variance, df), rng = _spread(frame, pooled), np.random.default_rng(seed)
    share = (
        weights**2 @ np.eye(len(df))[group]
    )  # [contrasts, groups]: what a group's variance is multiplied by
    part = np.where(share > 0, share * variance, 0.0)
    se = np.sqrt(part.sum(1))
    known = np.isfinite(se) & (se > 0)
    df_of, half = np.full((2, len(weights)), np.nan)
    if known.any():
        part, usual = part[known], np.maximum(df, 1)
        df_of[known] = part.sum(1) ** 2 / (part**2 / usual).sum(1)
        difference = (
            rng.normal(size=(n_draws, len(frame)))
            * np.sqrt(np.nan_to_num(variance))[group]
            @ weights[known].T
        )
        spread = np.sqrt(rng.chisquare(usual, (n_draws, len(df))) / usual @ part.T)
        smallest = stdtr(df_of[known], -np.abs(difference) / spread).min(1)
        half[known] = se[known] * -stdtrit(df_of[known], np.quantile(smallest, ALPHA))
    value = weights @ frame["value"].to_numpy()
    return pd.DataFrame(
        {
            "value": value,
            "se": np.where(known, se, np.nan),
            "df": df_of,
            "ci_low": value - half,
            "ci_high": value + half,
        }
    )


def _spread(frame: pd.DataFrame, pooled: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which runs share a variance (a group per run), and each group's variance and df: methods and,
    unless pooled, the cells that were repeated.
    """
    methods, cell = run_variance(frame), cell_codes(frame)
    n = np.bincount(cell)
    own = frame.groupby(cell)["value"].var().to_numpy()
    of_method = methods.index.get_indexer(frame["method"])
    group = of_method if pooled else np.where(n[cell] > 1, len(methods) + cell, of_method)
    return (
        group,
        np.append(methods["variance"].to_numpy(float), own),
        np.append(methods["df"].to_numpy(float), n - 1),
    )


# ---- the largest of them
def largest_contrasts(contrasts: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The largest absolute contrast of each factor within each method, and within any (method
    `all`), beside the largest between methods, as estimates.

    `contrasts` comes from matched_contrasts. With a simultaneous band, the largest true contrast is
    at least every row's near end and at most the largest far end: that is its interval. The row of
    EXCESS is the difference of the two largest; its interval decides the word (see `_excess_word`)
    and is conservative. A far end is unknown, and the interval open (null), where any row behind it
    has no interval.
    """
    methods = _methods(contrasts)
    factors = sorted(
        set(contrasts["factor"]) - {METHOD},
        key=lambda name: list(FACTORS.values()).index(name.split(" and ")[0]),
    )
    bases = contrasts["base_model"][contrasts["base_model"].ne("all")].unique()
    means = contrasts["grain"].eq(MEAN).any()
    told = (
        f"{100 * CONFIDENCE:g} % band over all {len(contrasts)} contrasts at once (min-p), run"
        f" variance per {'cell' if means else 'method'}"
    )
    between = _largest(
        contrasts[contrasts["factor"].eq(METHOD)], "no two methods were run at equal settings"
    )
    rows = [_row(between, "all", METHOD, BETWEEN, told)]
    for factor in factors:
        for method in ("all", *methods):
            own = contrasts[
                contrasts["factor"].eq(factor)
                & contrasts["method"].eq(contrasts["method"] if method == "all" else method)
            ]
            within = _largest(
                own[own["factor"].ne(METHOD)], f"no two cells of {method} differ in {factor} alone"
            )
            rows += [
                _row(within, method, factor, WITHIN, told),
                _row(_excess(within, between), method, factor, EXCESS, told),
            ]
    frame = pd.DataFrame(rows).assign(
        **labels, base_model=bases[0] if len(bases) == 1 else "all", population=POPULATION
    )
    return complete(frame.assign(contrast=frame["contrast"] + (f", {MEAN}" if means else "")))


def _methods(contrasts: pd.DataFrame) -> list[str]:
    between = contrasts[contrasts["factor"].eq(METHOD)]
    return list(
        dict.fromkeys(
            [
                *contrasts.loc[contrasts["factor"].ne(METHOD), "method"],
                *between["first"],
                *between["second"],
            ]
        )
    )


def _largest(rows: pd.DataFrame, otherwise: str) -> dict:
    """The largest absolute value of the contrasts with its interval, and in words which it is."""
    if rows.empty:
        return {"value": np.nan, "ci_low": np.nan, "ci_high": np.nan, "n_runs": 0, "how": otherwise}
    size, half = rows["value"].abs(), rows["ci_high"] - rows["value"]
    top = rows.loc[size.idxmax()]
    where = ", ".join(
        word
        for word in (top["base_model"], top["method"], top["setting"])
        if word not in ("all", "")
    )
    how = (
        f"largest of {len(rows)}: {where}: {top['second']} instead of {top['first']},"
        f" {top['value']:+.3g}"
    )
    how += (
        ""
        if half.notna().all()
        else f"; {half.isna().sum()} of them have no interval (no repetition, or none that differs)"
    )
    low, high = (size - half).max(), (size + half).max(skipna=False)
    return {
        "value": size.max(),
        "ci_low": max(low, 0.0) if pd.notna(low) else np.nan,
        "ci_high": high,
        "n_runs": top["n_runs"],
        "how": how,
    }


def _excess(within: dict, between: dict) -> dict:
    low, high = within["ci_low"] - between["ci_high"], within["ci_high"] - between["ci_low"]
    return within | {
        "value": within["value"] - between["value"],
        "ci_low": low,
        "ci_high": high,
        "how": f"{_excess_word(low, high)}; within: {within['how']}",
    }


def _row(found: dict, method: str, factor: str, contrast: str, told: str) -> dict:
    return {
        **found,
        "method": method,
        "group": FACTOR,
        "member": factor,
        "contrast": contrast,
        "how": f"{found['how']}; {told}",
    }


def _excess_word(low: float | None, high: float | None) -> str:
    """ "secondary" if the interval of EXCESS is below zero, "not secondary" if it is above, else
    "cannot tell".
    """
    if pd.notna(high) and high < 0:
        return SECONDARY
    return NOT_SECONDARY if pd.notna(low) and low > 0 else CANNOT_TELL


def verdicts(estimates: pd.DataFrame, grain: str | None = None) -> pd.DataFrame:
    """Factors x methods in words, from the rows of EXCESS: "secondary", "not secondary" or "cannot
    tell".

    By default the word on which both grains agree, "cannot tell" where they do not (no word where
    means are missing): means let opposite effects cancel, and single cells have intervals that hold
    only where variances are alike, so neither is enough alone.
    """
    if grain is None:
        means, cells = verdicts(estimates, MEAN), verdicts(estimates, CELL)
        return means.where(means.eq(cells) | means.isna(), CANNOT_TELL)
    rows = estimates[estimates["contrast"].eq(EXCESS if grain == CELL else f"{EXCESS}, {grain}")]
    words = [_excess_word(row.ci_low, row.ci_high) for row in rows.itertuples()]
    table = rows.assign(word=words, factor=rows["member"])
    return (
        table.pivot(index="factor", columns="method", values="word")
        .loc[table["factor"].unique(), table["method"].unique()]
        .rename_axis(columns=None)
    )
