"""How nearly the answers of two runs agree, measured without their text: by their length and, where
there is one, the judge's probability.

The measure is the surprise of an agreement: minus the log of the share of all pairs of runs of that
base model that agree at least as nearly on that prompt (frequency weights of record linkage:
Fellegi and Sunter 1969, J. Am. Stat. Assoc. 64:1183). A canned refusal that all runs give surprises
nobody; an equal long answer does.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from scipy.stats import t as t_distribution

from driftbook.doctors.study_tables import answers_of, settled

AGREEMENT = ["same_length", "same_verdict", "surprise"]
MEMBERSHIP = [
    "n_prompts",
    "nearest_run_id",
    "nearest_rate",
    "nearest_same_length",
    "nearest_same_verdict",
    "n_own",
    *(f"own_{what}" for what in AGREEMENT),
    "other_rate",
    "n_other",
    *(f"other_{what}" for what in AGREEMENT),
    *(f"peers_{what}" for what in AGREEMENT),
    "t_own",
    "t",
    "p",
]


def surprise(values: np.ndarray) -> np.ndarray:
    """[runs, runs, prompts] how surprising it is that two runs agree as nearly as they do, in nats;
    `values` is [runs, prompts].

    Minus the log of the share of the prompt's pairs of runs whose values are at least as near; NaN
    where a value is missing.
    """
    n, pairs = len(values), np.triu_indices(len(values), 1)
    gap = np.abs(values[pairs[0]] - values[pairs[1]])
    policy = "omit" if np.isnan(gap).any() else "propagate"  # which is much faster
    rank = rankdata(gap, method="max", axis=0, nan_policy=policy)
    found = np.full((n, n, values.shape[1]), np.nan, np.float32)
    found[pairs] = -np.log(rank / (~np.isnan(gap)).sum(0).clip(1))
    found[pairs[1], pairs[0]] = found[pairs]
    return found


def mean_agreement(of: dict[str, pd.DataFrame], run_ids: list[str]) -> np.ndarray:
    """[runs, runs, prompts] mean surprise of agreeing in length and in the judge's probability."""
    parts = [surprise(of["length"].loc[run_ids].to_numpy())]
    if "p_unsafe" in of and of["p_unsafe"].notna().to_numpy().any():
        parts.append(surprise(of["p_unsafe"].loc[run_ids].to_numpy().round(12)))
    values = np.stack(parts)
    return np.nan_to_num(values).sum(0) / (~np.isnan(values)).sum(0).clip(1)


def equal_share(of: dict[str, pd.DataFrame], runs: list[str], others: list[str]) -> np.ndarray:
    """The share of prompts on which pairs of runs agree in length, verdict and probability."""
    equal = np.ones((len(runs), of["length"].shape[1]), bool)
    for name in ("length", "harm", "p_unsafe"):
        if name in of:
            a, b = of[name].loc[runs].to_numpy(), of[name].loc[others].to_numpy()
            equal &= (np.abs(a - b) <= 1e-9) | (np.isnan(a) & np.isnan(b))
    return equal.mean(1)


def family_t(values: np.ndarray, family: np.ndarray) -> tuple[float, float]:
    """Student's t of the mean against 0 and its one-sided p; prompts of a family count as one."""
    per_family = np.bincount(family, values) / np.bincount(family).clip(1)
    spread = per_family.std(ddof=1) / np.sqrt(len(per_family))
    t = 0.0
    if spread > 0:
        t = per_family.mean() / spread
    elif per_family.any():
        t = np.sign(per_family.mean()) * np.inf
    return float(t), float(t_distribution.sf(t, len(per_family) - 1))


def answer_agreement(
    variants: pd.DataFrame, verdicts: pd.DataFrame, prompts: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row per run whose settings were run at several learning rates: with which runs its answers
    agree. Shares are of the prompts.

    nearest_run_id, nearest_rate, nearest_same_length, nearest_same_verdict: the run among those
    with the same settings but for rate and repetition whose answers agree most. own_*: the mean
    over the n_own repetitions of its own label; other_*: over the n_other runs of other_rate, the
    other label that it agrees with most; peers_*: how the runs of its own label agree with those.
    *_surprise are in nats (`surprise`). t_own: by how many standard errors (over prompts, families
    counting as one) it agrees more with its own label than with the other. t, p: it agrees with the
    other label both more than with its own and more than its peers do; the weaker of the two,
    one-sided, before any adjustment.
    """
    return label_agreement(settled(variants), answers_of(verdicts, prompts))


def label_agreement(ran: pd.DataFrame, of: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The table of answer_agreement, from settled variants and their answers."""
    rows = []
    known = "learning_rate" in ran and "length" in of
    ran = (
        ran[ran["learning_rate"].notna() & ran["run_id"].isin(of["length"].index)]
        if known
        else ran[:0]
    )
    ran = ran[ran.groupby("alike")["learning_rate"].transform("nunique").gt(1)]
    for _, base in ran.groupby("base_model", sort=False):
        base, run_ids = base.reset_index(drop=True), base["run_id"].tolist()
        nats, family = mean_agreement(of, run_ids), of["family"].to_numpy()
        answers = {"length": of["length"].loc[run_ids].to_numpy()}
        answers["verdict"] = np.full(answers["length"].shape, np.nan)
        if "harm" in of:
            answers["verdict"] = of["harm"].loc[run_ids].to_numpy()
        label = base["learning_rate"].to_numpy()
        for _, alike in base.groupby("alike", sort=False):
            for i in alike.index:
                row = _member(i, alike.index.to_numpy(), label, nats, answers, family)
                near = run_ids[row.pop("nearest")]
                rows.append({"run_id": run_ids[i], "nearest_run_id": near, **row})
    names = ("base_model", "method", "learning_rate", "repetition")
    names = [name for name in names if name in ran]
    found = pd.DataFrame(rows, columns=["run_id", *MEMBERSHIP]).astype({"run_id": object})
    return found.join(ran.set_index("run_id")[names], on="run_id")[["run_id", *names, *MEMBERSHIP]]


def _member(
    i: int,
    alike: np.ndarray,
    label: np.ndarray,
    nats: np.ndarray,
    answers: dict[str, np.ndarray],
    family: np.ndarray,
) -> dict:
    """Run i among those `alike`, against its own label and the other label it agrees with most."""
    others = alike[alike != i]
    own, near = others[label[others] == label[i]], others[nats[i, others].mean(1).argmax()]
    rates = [rate for rate in np.unique(label[others]) if rate != label[i]]
    groups = {rate: others[label[others] == rate] for rate in rates}
    rows = {rate: _against(i, own, group, nats, family) for rate, group in groups.items()}
    other = max(rates, key=lambda rate: rows[rate]["other_surprise"])
    group = groups[other]
    row = {"nearest": near, "n_prompts": nats.shape[2], "nearest_rate": label[near]}
    row |= {"n_own": len(own), "other_rate": other, "n_other": len(group), **rows[other]}
    pairs = {"nearest": ([i], [near]), "own": ([i], own), "other": ([i], group)}
    for name, (runs, with_) in (pairs | {"peers": (own, group)}).items():
        for what, values in answers.items():
            row[f"{name}_same_{what}"] = _same(values[runs][:, None], values[with_][None])
    return row


def _same(a: np.ndarray, b: np.ndarray) -> float:
    """The share of equal values among those that are there."""
    there = ~np.isnan(a) & ~np.isnan(b)
    return (a == b).sum() / there.sum() if there.any() else np.nan


def _against(
    i: int, own: np.ndarray, group: np.ndarray, nats: np.ndarray, family: np.ndarray
) -> dict[str, float]:
    """Whether run i agrees with a group more than with its own label, and than that label does."""
    to_group = nats[i, group].mean(0)
    row = dict.fromkeys(("own_surprise", "peers_surprise", "t_own", "t", "p"), np.nan)
    row["other_surprise"] = to_group.mean()
    if not len(own):
        return row
    to_own, peers = nats[i, own].mean(0), nats[np.ix_(own, group)].mean((0, 1))
    first, second = family_t(to_group - to_own, family), family_t(to_group - peers, family)
    t, p = max(first, second, key=lambda pair: pair[1])
    surprises = {"own_surprise": to_own.mean(), "peers_surprise": peers.mean()}
    return row | surprises | {"t_own": -first[0], "t": t, "p": p}
