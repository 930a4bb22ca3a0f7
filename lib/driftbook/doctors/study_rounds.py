"""Drift between rounds (repetitions): of the rates of all settings, and of what no-ops answer."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import digamma, polygamma
from scipy.stats import f as f_distribution

from driftbook.doctors.findings import finding_row, unchecked_row
from driftbook.doctors.study_answers import family_t, mean_agreement
from driftbook.doctors.study_tables import Given, alpha_of, asks_harm, is_no_op, numbers_of, rate_of
from driftbook.stats.intervals import holm

DRIFT_POINTS = 2.0  # percentage points that a round must lie apart; "preserves" has a margin of 3
DRIFT_SHARE = 0.1  # of the agreement of no-ops, lost between rounds


def rate_drift(given: Given) -> Iterator[dict]:
    """Rounds in which the rates of harm (unsafe, without a judge not refused) of all settings of a
    base model differ alike.

    Each method's round means, with the variance that is left within the method when settings and
    rounds are taken out, corrected for what settings that share a seed have in common; methods are
    weighted by their precision with Meier's correction for estimated weights (1953, Biometrics
    9:59, eq. for k means), and the round effects tested by F. A round must also lie DRIFT_POINTS
    apart.
    """
    of, ran, tables = given.answers, given.ran, {}
    if "repetition" in ran and "harm" in of:
        trained = _as_trained(given.answered(given.trained))
        asked = asks_harm(of["harm"].columns, given.table("prompts"))
        rate = 100 * of["harm"].loc[trained["run_id"], asked].mean(axis=1).to_numpy()
        for base_model, part in trained.assign(rate=rate).groupby("base_model", sort=False):
            wide = _rounds(part)
            if wide.shape[1] > 1 and wide.groupby("method").size().gt(1).any():
                tables[base_model] = wide
    if not tables:
        why = "no base model has verdicts of two settings of one method in the same two rounds"
        yield unchecked_row("drift", why)
        return
    found = tested_rounds(tables, 100 / asked.sum())
    name = rate_of(given.table("verdicts"))
    far = found["apart"].abs().ge(DRIFT_POINTS)
    for row in found[found["adjusted"].le(alpha_of("drift")) & far].itertuples():
        text = f"""round {row.round:g} of {row.base_model} lies {row.apart:+.1f} points in the
            {name} from the other rounds of the same {row.n} settings (F =
            {row.F:.1f}, p = {row.p:.1g}): something other than the seed changed between rounds.
            Score the base model again in each round, and compare within rounds."""
        where = f"{row.base_model} round {row.round:g}"
        yield finding_row("drift", "error", where, text, row.F, row.p, row.adjusted)


def _as_trained(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with their settings by the learning rate that was read back, where one was: a wrong
    label in one round would pass for drift.

    No-ops are a method of their own, since their spread is not that of runs that were trained.
    """
    done = numbers_of(runs, "trained_learning_rate").fillna(numbers_of(runs, "learning_rate"))
    method = runs["method"].astype(str) + np.where(is_no_op(runs), ", no-op", "")
    setting = [f"{alike} {rate:.3g}" for alike, rate in zip(runs["alike"], done, strict=True)]
    return runs.assign(setting=setting, method=method)


def _rounds(runs: pd.DataFrame) -> pd.DataFrame:
    """Settings (method, alike, setting) x rounds: rates, of settings that have the usual rounds."""
    index = ["method", "alike", "setting"]
    wide = runs.pivot_table(index=index, columns="repetition", values="rate")
    usual = wide.notna().value_counts()  # the rounds that a setting has, the most frequent first
    return wide.loc[:, list(usual.index[0])].dropna() if len(usual) else wide


def tested_rounds(tables: dict[str, pd.DataFrame], grain: float) -> pd.DataFrame:
    """A row per base model: n settings, F, p, adjusted (Holm over base models), round, apart."""
    shared = _shared_by_seed(tables)
    parts = pd.DataFrame(
        {"base_model": base_model, **part}
        for base_model, wide in tables.items()
        for part in _round_means(wide, grain, shared)
    )
    rows = []
    for base_model, own in moderated(parts).groupby("base_model", sort=False) if len(parts) else ():
        wide = tables[base_model]
        row = {"base_model": base_model, "n": len(wide), **_round_effects(own, wide.columns)}
        rows.append(row)
    found = pd.DataFrame(rows, columns=["base_model", "n", "F", "p", "round", "apart"])
    return found.assign(adjusted=holm(found["p"]) if len(found) else [])


def _deviations(wide: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """By method the deviations of a base model's rates from their settings' means."""
    return wide.sub(wide.mean(axis=1), axis=0).groupby("method")


def _shared_by_seed(tables: dict[str, pd.DataFrame]) -> float:
    """The correlation of settings that differ in the rate alone, and so may share a seed's init and
    data order, beyond that of other settings.

    Covariances within methods, pooled in units of each method's variance: (mates - others) / (own -
    others), which a drift common to all settings leaves alone; and one standard error (jackknife
    over base models and methods) more, since too little would raise false alarms. 1 where no method
    has settings of two kinds, so that it cannot be told.
    """
    parts = []
    for _, part in (method for wide in tables.values() for method in _deviations(wide)):
        cov = part.to_numpy() @ part.to_numpy().T
        alike = part.index.get_level_values("alike").to_numpy()
        same, own = alike[:, None] == alike, np.eye(len(part), dtype=bool)
        mates = same & ~own
        if mates.any() and (~same).any() and np.trace(cov) > 0:
            others = cov[~same].mean()
            excess = [cov[mates].mean() - others, cov[own].mean() - others]
            parts.append(excess / cov[own].mean())
    top, bottom = np.array(parts).sum(0) if parts else (0.0, 0.0)
    if bottom <= 0:
        return 1.0
    without = [(top - a) / (bottom - b) for a, b in parts] if len(parts) > 1 else [1.0]
    return float(np.clip(top / bottom + np.sqrt((len(parts) - 1) * np.var(without)), 0, 1))


def _round_means(wide: pd.DataFrame, grain: float, shared: float) -> Iterator[dict]:
    """Per method of a base model: the rounds' mean deviations from their settings' means, the
    variance left between settings, and its df.

    n: how many independent settings the mean is worth, where settings that share their seeds have
    the correlation `shared`.
    """
    for method, part in _deviations(wide):
        n, effect = len(part), part.mean().to_numpy()
        mates = shared * ((part.groupby("alike").size().to_numpy() ** 2).sum() / n - 1)
        if n - 1 > mates:  # else the settings are one, which says nothing about the variance
            squares, rounds = float(((part - effect) ** 2).to_numpy().sum()), len(effect) - 1
            yield {
                "method": method,
                "effect": effect,
                "variance": max(squares / ((n - 1 - mates) * rounds), grain**2),
                "df": (n - 1) * rounds / (1 + shared * mates),
                "n": n / (1 + mates),
            }


def moderated(parts: pd.DataFrame) -> pd.DataFrame:
    """The variances of a method in several base models drawn together as far as they are alike,
    with their df.

    Smyth (2004, Stat. Appl. Genet. Mol. Biol. 3:3, section 6.2): the prior df solves trigamma(d0 /
    2) = the variance of log s2 less what the df explain; here that variance is pooled over methods,
    each of which has its own prior mean. No more df than the method has in all.
    """
    df, variance, methods = parts["df"], parts["variance"], parts["method"]
    log = np.log(variance) - digamma(df / 2) + np.log(df / 2)
    mean, free = log.groupby(methods).transform("mean"), len(parts) - methods.nunique()
    if free < 1:
        return parts
    excess = ((log - mean) ** 2).sum() / free - polygamma(1, df / 2).mean()
    d0 = 2 * brentq(lambda x: polygamma(1, x) - excess, 1e-3, 1e6) if excess > 2e-6 else 1e6
    prior = np.exp(mean + digamma(d0 / 2) - np.log(d0 / 2))
    several = methods.map(methods.value_counts()).gt(1)
    drawn = (d0 * prior + df * variance) / (d0 + df)
    most = np.minimum(d0 + df, parts.groupby("method")["df"].transform("sum"))
    return parts.assign(variance=drawn.where(several, variance), df=most.where(several, df))


def _round_effects(parts: pd.DataFrame, rounds: pd.Index) -> dict[str, float]:
    """F and p of round effects common to all methods, and the round farthest from the others."""
    weight, df = (parts["n"] / parts["variance"]).to_numpy(), parts["df"].to_numpy()
    share, n = weight / weight.sum(), len(rounds) - 1
    effect = np.average(np.stack(parts["effect"]), axis=0, weights=weight)
    meier = 1 + 4 * (share * (1 - share) / df).sum()
    f, at = weight.sum() * (effect**2).sum() / n / meier, int(np.abs(effect).argmax())
    p = f_distribution.sf(f, n, 1 / (share**2 / df).sum())
    apart = effect[at] - np.delete(effect, at).mean()
    return {"F": float(f), "p": float(p), "round": rounds[at], "apart": float(apart)}


# ---- what no-ops answer
def no_op_drift(given: Given) -> Iterator[dict]:
    """No-ops of a base model, and the base itself where it was scored again, of which those of one
    round agree less with the others' than all else.

    Only pairs of different settings count, whose trainings have nothing but the round in common.
    Tested over prompts, each round against the rest. A tenth of the agreement must also be lost.
    """
    ran, of = given.ran, given.answers
    runs_of = ran.groupby(["base_model", "method"])["run_id"].transform("size")
    known = ran[ran["method"].eq("none") & runs_of.gt(1) | is_no_op(ran)]
    known = given.answered(known) if "length" in of and "repetition" in known else known[:0]
    rows = [
        {"base_model": base_model, **row}
        for base_model, runs in known.groupby("base_model", sort=False)
        for row in _odd_rounds(runs, of)
    ]
    if not rows:
        why = """no base model has no-ops of two settings in two rounds; score the base model
            again in each round to see drift plainly"""
        yield unchecked_row("no_ops_disagree", why)
        return
    found = pd.DataFrame(rows).assign(adjusted=lambda frame: holm(frame["p"]))
    # the other rounds disagree with the odd one too
    found = found.sort_values("gap", ascending=False).drop_duplicates("base_model")
    lost = found["between"].le((1 - DRIFT_SHARE) * found["within"])
    for row in found[found["adjusted"].le(alpha_of("no_ops_disagree")) & lost].itertuples():
        text = f"""runs of {row.base_model} that training left as they were ({row.n}) have
            answers of exactly the same length on {100 * row.between:.1f} % of prompts between round
            {row.round:g} and the others, and on {100 * row.within:.1f} % otherwise (t =
            {row.t:.1f}): the rounds were not run alike (texts, template, decoding or machine).
            Compare within rounds only."""
        where = f"{row.base_model} round {row.round:g}"
        yield finding_row("drift", "error", where, text, row.t, row.p, row.adjusted)


def _odd_rounds(runs: pd.DataFrame, of: dict[str, pd.DataFrame]) -> Iterator[dict]:
    """How runs of different settings agree across each round's border, and on either side of it."""
    a, b = np.triu_indices(len(runs), 1)
    rounds, setting = runs["repetition"].to_numpy(), runs["setting"].to_numpy()
    values = of["length"].loc[runs["run_id"]].to_numpy()
    nats = mean_agreement(of, runs["run_id"].tolist())[a, b]
    equal, apart = values[a] == values[b], setting[a] != setting[b]
    for one in np.unique(rounds):
        across = (rounds[a] == one) != (rounds[b] == one)
        between, within = apart & across, apart & ~across
        if between.any() and within.any():
            gap = nats[within].mean(0) - nats[between].mean(0)
            t, p = family_t(gap, of["family"].to_numpy())
            shares = {"within": equal[within].mean(), "between": equal[between].mean()}
            yield {"round": one, "n": len(runs), "gap": gap.mean(), "t": t, "p": p, **shares}
