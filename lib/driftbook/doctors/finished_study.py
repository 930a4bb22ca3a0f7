"""What is wrong with a study, found from its tables: labels, no-ops, seeds, rounds, echoed prompts,
and what its data cannot say.

An **error** makes the study's own labels or answers untrustworthy; a **warning** says what may be
read wrongly; a **note** says what the data cannot tell, or what could not be checked. Findings by
count need no test. Those by test share ALPHA: each kind of test has its part of it (SHARES), within
which p values are adjusted by Holm's method, so that a study without flaws raises a false alarm at
most 5 % of the time.

Whether two answers to a prompt are near copies is measured without their text: by their length,
exactly equal between copies and seldom otherwise, and the judge's probability where there is one.
The measure is the surprise of an agreement: minus the log of the share of all pairs of runs of that
base model that agree at least as nearly on that prompt (frequency weights of record linkage:
Fellegi and Sunter 1969, J. Am. Stat. Assoc. 64:1183). A canned refusal that all runs give surprises
nobody; an equal long answer does.
"""

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import digamma, polygamma
from scipy.stats import f as f_distribution
from scipy.stats import pearsonr, rankdata
from scipy.stats import t as t_distribution

from driftbook.stats.intervals import holm
from driftbook.study.methods import MITIGATION_KINDS
from driftbook.study.tables import TABLES

ALPHA = 0.05
SHARES = {
    "mislabelled_rate": 0.15,
    "drift": 0.65,
    "no_ops_disagree": 0.1,
    "one_seed": 0.05,
    "echo": 0.05,
}  # of ALPHA, by kind of test
COLUMNS = ["finding", "severity", "where", "sentence", "statistic", "p", "p_adjusted"]
SETTING = [
    "base_model",
    "method",
    "objective",
    "dataset",
    "n_train",
    "learning_rate",
    "epochs",
    "init",
    "mitigation",
    "template",
    "system_prompt",
    "settings",
]
NO_OP_KL = 1e-4  # training.NO_OP_KL; that module imports torch
NO_OP_DOSE = 1e-3  # of the base model's own loss, where no KL was recorded
NEARLY_ALL = 0.97  # of the prompts answered as the base model answers them
# standard errors by which a run must agree with its own label to count as told by its answers
TOLD = 2.0
# of a method's runs: below it, its answers do not tell the rate; one wrong run in six, with its two
# peers, leaves a half or more
TOLD_SHARE = 0.6
# percentage points that a round must lie apart: below the margin of 3 by which "preserves" is
# judged
DRIFT_POINTS = 2.0
DRIFT_SHARE = 0.1  # of the agreement of no-ops, lost between rounds
# rank correlation of two training curves' steps, from which they saw the same batches in the same
# order
IN_STEP = 0.9
ECHO_START = 40  # characters of the prompt with which an echo begins
ECHO_SHARE = 0.1  # of a run's responses
UNSCORED = 0.1  # share of answers without a verdict; the same as a difference to the base model


def study(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The findings about a study, errors first: finding, severity, where (run_ids or names),
    sentence, statistic, p, p_adjusted.

    Reads what is there of variants (needed), runs, verdicts, prompts, curves, rates, answers;
    responses together with texts (benchmark, prompt_id, prompt) for echoes. `verdicts` may hold
    response_chars in place of n_tokens. What cannot be checked is a note that begins with "not
    checked".

    Raises:
        ValueError: there is no table `variants`, or no variant in it.
    """
    if "variants" not in tables or tables["variants"].empty:
        raise ValueError(
            "a study is checked by its variants: the table `variants` is missing or empty; run"
            " notebook 01 or make study"
        )
    given = _arranged(tables)
    found = pd.DataFrame([row for check in CHECKS for row in check(given)], columns=COLUMNS)
    order = found["severity"].map({"error": 0, "warning": 1, "note": 2})
    return found.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def sentences(findings: pd.DataFrame) -> str:
    """The findings as a list in markdown, a line each."""
    if findings.empty:
        return "Nothing was found.\n"
    lines = [
        f"- **{row.severity}, {row.finding.replace('_', ' ')}**: {row.sentence}"
        for row in findings.itertuples()
    ]
    return "\n".join(lines) + "\n"


def alarms(findings: pd.DataFrame) -> pd.DataFrame:
    """The errors and warnings among the findings."""
    return findings[findings["severity"].ne("note")]


# ---- what the checks read
def _arranged(tables: dict[str, pd.DataFrame]) -> dict:
    """The tables without repeated rows; `runs` joined to their variants, with their setting;
    `answers_of`: each outcome as runs x prompts.

    A repaired run was not trained, so that it is no repetition, no no-op and no copy: it is among
    `planned`, and not among those that `ran`.
    """
    repeated = {
        name: int(frame.duplicated(_key(name, frame)).sum())
        for name, frame in tables.items()
        if _key(name, frame)
    }
    frames = {
        name: frame.drop_duplicates(_key(name, frame)) if repeated.get(name) else frame
        for name, frame in tables.items()
    }
    planned = settled(frames["variants"])
    runs = frames.get("runs")
    if runs is not None:
        recorded = runs.drop(
            columns=[name for name in runs if name in planned and name != "run_id"]
        )
        planned = planned.merge(recorded, on="run_id", how="left")
    status = planned["status"] if "status" in planned else pd.Series("ok", planned.index)
    planned["status"] = status.fillna("never ran").astype(object)
    planned["repaired"] = (
        [_is_repaired(settings) for settings in planned["settings"]]
        if "settings" in planned
        else False
    )
    return {
        **frames,
        "planned": planned,
        "ran": planned[planned["status"].eq("ok") & ~planned["repaired"]].reset_index(drop=True),
        "repeated": repeated,
        "answers_of": answers_of(frames.get("verdicts"), frames.get("prompts")),
    }


def _is_repaired(settings: str) -> bool:
    """Whether a variant was made from a trained one, by what its settings say of its mitigation."""
    try:
        kind = (json.loads(settings).get("mitigation") or {}).get("kind")
    except (TypeError, ValueError, AttributeError):
        return False
    return kind in MITIGATION_KINDS and MITIGATION_KINDS[kind].when != "training"


def _key(name: str, frame: pd.DataFrame) -> list[str]:
    """The declared key of a table as far as the frame has it; nothing for frames that are no table."""
    return [column for column in TABLES[name].key if column in frame] if name in TABLES else []


def settled(variants: pd.DataFrame) -> pd.DataFrame:
    """The variants with `setting` (equal but for the repetition) and `alike` (equal but for
    learning rate and repetition), as numbers.
    """
    frame = variants.reset_index(drop=True)
    keys = [name for name in SETTING if name in frame]
    text = frame[keys].astype(object).where(frame[keys].notna(), "").astype(str)
    rest = [name for name in keys if name != "learning_rate"]
    numbers = {
        name: _numbers(frame[name])
        for name in ("learning_rate", "epochs", "seed", "repetition")
        if name in frame
    }
    return frame.assign(
        **numbers, setting=text.groupby(keys).ngroup(), alike=text.groupby(rest).ngroup()
    )


def answers_of(
    verdicts: pd.DataFrame | None, prompts: pd.DataFrame | None = None
) -> dict[str, pd.DataFrame]:
    """Runs x (benchmark, prompt_id) of the greedy answers: length, p_unsafe, unsafe (by the first
    judge), refusal; what is null is NaN.

    Empty where there are no verdicts. The columns' attribute `families` numbers the prompts made
    from one template (each its own where unknown).
    """
    if verdicts is None or verdicts.empty:
        return {}
    rows = verdicts
    for column, value in (
        ("decoding", "greedy"),
        ("prompt_variant", "default"),
        ("judge", verdicts["judge"].iloc[0] if "judge" in verdicts else None),
    ):
        if column in rows:
            rows = rows[rows[column].eq(value)]
    rows = (
        rows.assign(benchmark=rows["benchmark"])
        if "benchmark" in rows
        else rows.assign(benchmark="all")
    )
    run, run_ids = pd.factorize(rows["run_id"], sort=True)
    unit, units = pd.factorize(
        pd.MultiIndex.from_frame(rows[["benchmark", "prompt_id"]].astype(object)), sort=True
    )
    index, columns = (
        pd.Index(run_ids.astype(object), name="run_id"),
        pd.MultiIndex.from_tuples(units, names=["benchmark", "prompt_id"]),
    )
    length = next(
        (
            name
            for name in ("n_tokens", "response_chars")
            if name in rows and rows[name].notna().any()
        ),
        "n_tokens",
    )
    found = {}
    for name, column in {
        "length": length,
        "p_unsafe": "p_unsafe",
        "unsafe": "unsafe",
        "refusal": "refusal",
    }.items():
        values = np.full((len(index), len(columns)), np.nan)
        if column in rows:
            values[run, unit] = _numbers(rows[column])
            found[name] = pd.DataFrame(values, index, columns)
    asked = np.zeros((len(index), len(columns)))
    asked[run, unit] = 1
    return {
        **found,
        "asked": pd.DataFrame(asked, index, columns),
        "family": _families(columns, prompts),
    }


def _families(columns: pd.MultiIndex, prompts: pd.DataFrame | None) -> pd.Series:
    """A number per prompt: its family, or its own where none is known."""
    own = pd.Series([f"{benchmark} {prompt}" for benchmark, prompt in columns], columns)
    if prompts is not None and "family" in prompts and prompts["family"].notna().any():
        known = prompts.set_index(["benchmark", "prompt_id"])["family"].astype(object)
        known.index = pd.MultiIndex.from_tuples(
            [tuple(key) for key in known.index], names=columns.names
        )
        own = known.reindex(columns).where(lambda family: family.notna(), own)
    return pd.Series(pd.factorize(own)[0], columns)


def _harmful(columns: pd.MultiIndex, prompts: pd.DataFrame | None) -> np.ndarray:
    """Which of these prompts ask for harm; all of them where no kind is known, or none does."""
    if prompts is None or "kind" not in prompts:
        return np.ones(len(columns), bool)
    harmful = prompts.loc[
        prompts["kind"].eq("harmful").fillna(False).astype(bool), ["benchmark", "prompt_id"]
    ].astype(object)
    found = columns.isin([tuple(key) for key in harmful.to_numpy()])
    return found if found.any() else np.ones(len(columns), bool)


def _numbers(values: pd.Series) -> np.ndarray:
    """Whole, real or true/false values as floats; NaN where null."""
    if values.dtype == object:
        values = (
            values.infer_objects()
            if not values.isin([True, False]).any()
            else values.astype("boolean")
        )
    return values.astype("Float64").to_numpy(float, na_value=np.nan)


def _row(
    finding: str,
    severity: str,
    where,
    sentence: str,
    statistic: float | None = None,
    p: float | None = None,
    adjusted: float | None = None,
) -> dict:
    where = where if isinstance(where, str) else ", ".join(map(str, where))
    return dict(
        zip(COLUMNS, (finding, severity, where, sentence, statistic, p, adjusted), strict=True)
    )


def _unchecked(finding: str, why: str) -> dict:
    return _row(finding, "note", "", f"not checked: {why}")


def _named(run_ids, most: int = 3) -> str:
    """The first few names, and how many more there are."""
    run_ids = list(run_ids)
    more = f" and {len(run_ids) - most} more" if len(run_ids) > most else ""
    return ", ".join(map(str, run_ids[:most])) + more


# ---- agreement of answers
def surprise(values: np.ndarray) -> np.ndarray:
    """[runs, runs, prompts] how surprising it is that two runs agree as nearly as they do, in nats;
    `values` is [runs, prompts].

    Minus the log of the share of the prompt's pairs of runs whose values are at least as near; NaN
    where a value is missing.
    """
    n, pairs = len(values), np.triu_indices(len(values), 1)
    gap = np.abs(values[pairs[0]] - values[pairs[1]])
    rank = (
        rankdata(gap, method="max", axis=0, nan_policy="omit")
        if np.isnan(gap).any()
        else rankdata(gap, method="max", axis=0)
    )
    found = np.full((n, n, values.shape[1]), np.nan, np.float32)
    found[pairs] = -np.log(rank / (~np.isnan(gap)).sum(0).clip(1))
    found[pairs[1], pairs[0]] = found[pairs]
    return found


def _agreement(of: dict[str, pd.DataFrame], run_ids: list[str]) -> np.ndarray:
    """[runs, runs, prompts] the mean surprise of agreeing in length and, where there is one, in the
    judge's probability.
    """
    parts = [surprise(of["length"].loc[run_ids].to_numpy())]
    if "p_unsafe" in of and of["p_unsafe"].notna().to_numpy().any():
        parts.append(surprise(of["p_unsafe"].loc[run_ids].to_numpy().round(12)))
    return np.nan_to_num(_mean(np.stack(parts)))


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    return np.where(there.any(0), np.where(there, values, 0).sum(0) / there.sum(0).clip(1), np.nan)


def _t(values: np.ndarray, family: np.ndarray) -> tuple[float, float]:
    """Student's t of the mean of the values against 0 and its one-sided p; prompts of a family
    count as one.
    """
    per_family = np.bincount(family, values) / np.bincount(family).clip(1)
    spread = per_family.std(ddof=1) / np.sqrt(len(per_family))
    t = (
        per_family.mean() / spread
        if spread > 0
        else np.sign(per_family.mean()) * np.inf
        if per_family.any()
        else 0.0
    )
    return float(t), float(t_distribution.sf(t, len(per_family) - 1))


def agreement_of_answers(
    variants: pd.DataFrame, verdicts: pd.DataFrame, prompts: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row per run whose settings were run at several learning rates: with which runs its answers
    agree. Shares are of the prompts.

    nearest_run_id, nearest_rate, nearest_same_length, nearest_same_verdict: the run among those
    with the same settings but for rate and repetition whose answers agree most. own_*: the mean
    over the n_own repetitions of its own label; other_*: over the n_other runs of other_rate, the
    label that it agrees with most beside its own; peers_*: how the runs of its own label agree with
    those. *_surprise are in nats (`surprise`). t_own: by how many standard errors (over prompts,
    families counting as one) it agrees more with its own label than with the other. t, p: it agrees
    with the other label both more than with its own and more than its peers do; the weaker of the
    two, one-sided, before any adjustment.
    """
    return _membership(settled(variants), answers_of(verdicts, prompts))


def _membership(ran: pd.DataFrame, of: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = []
    ran = (
        ran[ran["learning_rate"].notna() & ran["run_id"].isin(of["length"].index)]
        if "learning_rate" in ran and "length" in of
        else ran[:0]
    )
    ran = ran[ran.groupby("alike")["learning_rate"].transform("nunique").gt(1)]
    for _, base in ran.groupby("base_model", sort=False):
        base, run_ids = base.reset_index(drop=True), base["run_id"].tolist()
        nats, length = _agreement(of, run_ids), of["length"].loc[run_ids].to_numpy()
        verdict = (
            of["unsafe"].loc[run_ids].to_numpy()
            if "unsafe" in of
            else np.full(length.shape, np.nan)
        )
        label, family = base["learning_rate"].to_numpy(), of["family"].to_numpy()
        for _, alike in base.groupby("alike", sort=False):
            found = [
                _member(i, alike.index.to_numpy(), label, nats, length, verdict, family)
                for i in alike.index
            ]
            rows += [
                {**one, "nearest_run_id": run_ids[one["nearest"]], "run_id": run_ids[one["run"]]}
                for one in found
            ]
    named = [
        name for name in ("base_model", "method", "learning_rate", "repetition") if name in ran
    ]
    found = pd.DataFrame(rows, columns=["run_id", *MEMBERSHIP]).astype({"run_id": object})
    return found.join(ran.set_index("run_id")[named], on="run_id")[["run_id", *named, *MEMBERSHIP]]


MEMBERSHIP = [
    "n_prompts",
    "nearest_run_id",
    "nearest_rate",
    "nearest_same_length",
    "nearest_same_verdict",
    "n_own",
    "own_same_length",
    "own_same_verdict",
    "own_surprise",
    "other_rate",
    "n_other",
    "other_same_length",
    "other_same_verdict",
    "other_surprise",
    "peers_same_length",
    "peers_same_verdict",
    "peers_surprise",
    "t_own",
    "t",
    "p",
]


def _member(
    i: int,
    alike: np.ndarray,
    label: np.ndarray,
    nats: np.ndarray,
    length: np.ndarray,
    verdict: np.ndarray,
    family: np.ndarray,
) -> dict:
    """Run i of those with the same settings but for the rate (alike), against its own label and the
    other label it agrees with most.
    """
    others = alike[alike != i]
    own, near = others[label[others] == label[i]], others[nats[i, others].mean(1).argmax()]
    groups = [
        others[label[others] == rate] for rate in np.unique(label[others]) if rate != label[i]
    ]
    group, best = max(
        ((one, _against(i, own, one, nats, family)) for one in groups),
        key=lambda pair: pair[1]["other_surprise"],
    )
    row = {
        "run": i,
        "nearest": near,
        "n_prompts": length.shape[1],
        "nearest_rate": label[near],
        "n_own": len(own),
        "other_rate": label[group[0]],
        "n_other": len(group),
        **best,
    }
    for name, runs, with_ in (
        ("nearest", [i], [near]),
        ("own", [i], own),
        ("other", [i], group),
        ("peers", own, group),
    ):
        row |= _shares(name, runs, with_, length, verdict)
    return row


def _shares(name: str, runs, others, length: np.ndarray, verdict: np.ndarray) -> dict[str, float]:
    """The mean share of prompts on which these runs and the others have answers of the same length,
    and the same verdict.
    """
    found = {}
    for what, values in (("length", length), ("verdict", verdict)):
        a, b = values[runs][:, None], values[others][None]
        there = ~np.isnan(a) & ~np.isnan(b)
        found[f"{name}_same_{what}"] = (a == b).sum() / there.sum() if there.any() else np.nan
    return found


def _against(i: int, own, group, nats: np.ndarray, family: np.ndarray) -> dict[str, float]:
    """Whether run i agrees with a group of another label more than with its own label, and more
    than its own label does.
    """
    to_group = nats[i, group].mean(0)
    if not len(own):
        return {
            "own_surprise": np.nan,
            "other_surprise": to_group.mean(),
            "peers_surprise": np.nan,
            "t_own": np.nan,
            "t": np.nan,
            "p": np.nan,
        }
    to_own, peers = nats[i, own].mean(0), nats[np.ix_(own, group)].mean((0, 1))
    first, second = _t(to_group - to_own, family), _t(to_group - peers, family)
    weaker = max(first, second, key=lambda pair: pair[1])
    return {
        "own_surprise": to_own.mean(),
        "other_surprise": to_group.mean(),
        "peers_surprise": peers.mean(),
        "t_own": -first[0],
        "t": weaker[0],
        "p": weaker[1],
    }


# ---- 1 mislabelled settings
def recorded_settings(given: dict) -> Iterator[dict]:
    """Labels that the trainer's own record contradicts: learning rate, epochs, seed; where no rate
    was read back, the logged one.
    """
    ran, finding = given["ran"], "mislabelled_rate"
    pairs = {
        "learning_rate": "trained_learning_rate",
        "epochs": "trained_epochs",
        "seed": "trained_seed",
    }
    for label, record in pairs.items():
        if label not in ran or record not in ran or ran[record].isna().all():
            if label == "learning_rate" and ran["method"].ne("none").any():
                yield _unchecked(
                    finding,
                    "no learning rate was read back from a trainer (runs.trained_learning_rate)",
                )
            continue
        asked, done = _numbers(ran[label]), _numbers(ran[record])
        wrong = ran[np.abs(done - asked) > 1e-3 * np.abs(asked)]
        if len(wrong):
            one = wrong.iloc[0]
            name = finding if label == "learning_rate" else f"mislabelled_{label}"
            yield _row(
                name,
                "error",
                wrong["run_id"],
                f"runs trained at another {label.replace('_', ' ')} than their label says:"
                f" {len(wrong)} of {(~np.isnan(done)).sum()} ({_named(wrong['run_id'])}); the first"
                f" is labelled {one[label]:g} and was trained at {float(one[record]):g}. Take the"
                " trainer's record as the label and fit again.",
            )
    yield from _logged_rates(given)


def _logged_rates(given: dict) -> Iterator[dict]:
    """Runs without a rate read back whose training curve logs rates that their label does not
    allow: above it, or never above half of it.
    """
    ran, curves = given["ran"], given.get("curves")
    if curves is None or curves.empty or "learning_rate" not in ran:
        return
    silent = ran[ran["trained_learning_rate"].isna()] if "trained_learning_rate" in ran else ran
    peak = curves[curves["split"].eq("train")].groupby("run_id")["learning_rate"].max()
    ratio = _numbers(silent["run_id"].map(peak).astype("Float64")) / silent[
        "learning_rate"
    ].to_numpy(float)
    wrong = silent[(ratio > 1.01) | (ratio < 0.5)]
    if len(wrong):
        yield _row(
            "mislabelled_rate",
            "error",
            wrong["run_id"],
            f"training curves with rates that their label does not allow: {len(wrong)}"
            f" ({_named(wrong['run_id'])}); at most {float(peak[wrong['run_id'].iloc[0]]):g} under"
            f" the label {wrong['learning_rate'].iloc[0]:g} in the first. Find the trainer's"
            " arguments.",
        )


def rates_from_answers(given: dict) -> Iterator[dict]:
    """Runs whose answers are those of another rate than their label's.

    Tested where a method's answers tell the rate: at least three of its runs in five must agree
    with their own label's repetitions more than with the other label's runs, by 2 standard errors.
    A soft prompt's do not where its seed matters more than its rate.
    """
    finding, found = "mislabelled_rate", _membership(given["ran"], given["answers_of"])
    tested = found[found["p"].notna()]
    if tested.empty:
        yield _unchecked(
            finding + "_by_answers",
            "no setting has answers at two learning rates and in two repetitions of one of them",
        )
        return
    told = tested["t_own"].gt(TOLD).groupby(tested["method"]).agg(["mean", "size"])
    telling = told.index[told["mean"].ge(TOLD_SHARE) & told["size"].ge(4)]
    for method, row in told.drop(telling).iterrows():
        yield _unchecked(
            finding + "_by_answers",
            f"answers of {method} do not tell the rate: {100 * row['mean']:.0f} % of"
            f" {row['size']:.0f} runs agree more with their own label than with another, beyond"
            " chance; what a mislabelled run would look like, these runs look like anyway",
        )
    tested = tested[tested["method"].isin(telling)]
    tested = tested.assign(adjusted=holm(tested["p"]) if len(tested) else [])
    for row in tested[tested["adjusted"].le(SHARES[finding] * ALPHA)].itertuples():
        yield _row(
            finding,
            "warning",
            row.run_id,
            f"{row.run_id} answers as runs at {row.other_rate:g} do, not as its label"
            f" {row.learning_rate:g}: {100 * row.other_same_length:.1f} % of its answers have"
            f" exactly the length of theirs, against {100 * row.own_same_length:.1f} % with its own"
            f" label and {100 * row.peers_same_length:.1f} % between the two labels. Look for the"
            " trainer's own record before any contrast of rates is read.",
            row.t,
            row.p,
            row.adjusted,
        )
    lone = found.loc[found["p"].isna(), "run_id"]
    if len(lone):
        yield _row(
            finding + "_by_answers",
            "note",
            lone,
            f"not checked: runs without another run of their own label to agree with: {len(lone)}"
            f" ({_named(lone)})",
        )


# ---- 2 no-ops
def no_ops(given: dict) -> Iterator[dict]:
    """Trained runs that are the base model: by record, by a dose near zero, or by answers that are
    the base model's on nearly all prompts.
    """
    ran = given["ran"]
    trained = ran[ran["learning_rate"].notna()] if "learning_rate" in ran else ran[:0]
    record = _numbers(trained["no_op"]) if "no_op" in trained else np.full(len(trained), np.nan)
    recorded, still = record == 1, np.isnan(record) & _no_dose(trained)
    for runs, how in (
        (trained[recorded], "recorded as no-ops"),
        (trained[still], "with a dose near zero and no word on being a no-op"),
    ):
        if len(runs):
            yield _row(
                "no_op",
                "warning",
                runs["run_id"],
                f"trained runs {how}: {len(runs)} of {len(trained)} ({_named(runs['run_id'])})."
                " Training left the base model as it was: show every contrast with and without"
                " them, or raise their learning rate.",
            )
    yield from _answers_as_base(
        given, trained[~recorded & ~still], ran[ran["method"].eq("none")], trained[recorded]
    )


def _no_dose(trained: pd.DataFrame) -> np.ndarray:
    """Which runs have a KL below NO_OP_KL (to their init, else to the base) or, where there is
    none, a dose below a thousandth of the base's loss.
    """
    if trained.empty:
        return np.zeros(0, bool)
    columns = {
        name: _numbers(trained[name]) if name in trained else np.full(len(trained), np.nan)
        for name in ("kl_init", "kl_base", "dose_nll", "nll_base")
    }
    kl = np.where(np.isnan(columns["kl_init"]), columns["kl_base"], columns["kl_init"])
    return np.where(
        np.isnan(kl), np.abs(columns["dose_nll"]) < NO_OP_DOSE * columns["nll_base"], kl < NO_OP_KL
    )


def _answers_as_base(
    given: dict, trained: pd.DataFrame, bases: pd.DataFrame, recorded: pd.DataFrame
) -> Iterator[dict]:
    """Runs whose answers equal those of the base model (or of known no-ops) in length and verdict
    as often as these equal each other.
    """
    of, known = given["answers_of"], pd.concat([bases, recorded])
    if "length" not in of or not known["run_id"].isin(of["length"].index).any():
        yield _unchecked(
            "no_op_by_answers", "neither a base model nor a known no-op has answers to compare with"
        )
        return
    if of["length"].nunique().max() < 2:
        yield _unchecked("no_op_by_answers", "answers to a prompt are all of one length")
        return
    for base_model, runs in trained[trained["run_id"].isin(of["length"].index)].groupby(
        "base_model", sort=False
    ):
        standard = known.loc[
            known["base_model"].eq(base_model) & known["run_id"].isin(of["length"].index), "run_id"
        ].tolist()
        if not standard:
            continue
        among = np.concatenate(
            [_equal(of, standard[:i], [one] * i) for i, one in enumerate(standard)]
        )
        usual = np.quantile(among, 0.75) if len(among) else 0.0
        bound = min(NEARLY_ALL, usual) if usual > 0.5 else NEARLY_ALL
        share = np.mean(
            [_equal(of, runs["run_id"].tolist(), [one] * len(runs)) for one in standard], axis=0
        )
        same = runs[share >= bound]
        if len(same):
            yield _row(
                "no_op",
                "warning",
                same["run_id"],
                f"trained runs of {base_model} that answer as the untrained model does: {len(same)}"
                f" of {len(runs)} ({_named(same['run_id'])}), on"
                f" {100 * share[share >= bound].min():.1f} % of the prompts or more (bound"
                f" {100 * bound:.1f} %). In effect they are no-ops: look at their dose.",
            )


def _equal(of: dict[str, pd.DataFrame], runs: list[str], others: list[str]) -> np.ndarray:
    """The share of prompts on which each run and its other have answers of equal length, verdict,
    and the judge's probability.
    """
    equal = np.ones((len(runs), of["length"].shape[1]), bool)
    for name in ("length", "unsafe", "p_unsafe"):
        if name in of:
            a, b = of[name].loc[runs].to_numpy(), of[name].loc[others].to_numpy()
            equal &= (np.abs(a - b) <= 1e-9) | (np.isnan(a) & np.isnan(b))
    return equal.mean(1)


# ---- 3 one seed for all
def one_seed(given: dict) -> Iterator[dict]:
    """Repetitions that are no repetitions: one recorded seed, one adapter, the same batches in the
    same order, or the same answers.
    """
    ran = given["ran"]
    trained = ran[ran["method"].ne("none")]
    seeds = (
        trained["trained_seed"] if "trained_seed" in trained else pd.Series(np.nan, trained.index)
    )
    seeds = pd.Series(_numbers(seeds), trained.index).fillna(
        trained.get("seed", pd.Series(np.nan, trained.index)).astype(float)
    )
    if seeds.isna().all():
        yield _unchecked("one_seed", "no seed is recorded")
    shared = trained[
        seeds.notna() & trained.assign(read=seeds).duplicated(["setting", "read"], keep=False)
    ]
    if len(shared):
        yield _row(
            "one_seed",
            "error",
            shared["run_id"],
            f"runs that share their seed with another repetition of the same setting: {len(shared)}"
            f" of {len(trained)}, in {shared['setting'].nunique()} settings (distinct seeds:"
            f" {seeds[shared.index].nunique()}, the first {seeds[shared.index[0]]:g}). They are"
            " copies of one run but for the hardware's rounding, and their spread says nothing"
            " about seeds: call them one run, or run again with distinct seeds.",
        )
    yield from _one_adapter(trained)
    yield from _curves_in_step(given, trained)
    yield from _same_answers(given, trained)


def _one_adapter(trained: pd.DataFrame) -> Iterator[dict]:
    """Trained runs of one base model with the same bytes; untrained adapters may be equal."""
    if "adapter_sha256" not in trained or trained["adapter_sha256"].isna().all():
        yield _unchecked("one_adapter", "no adapter's hash is recorded")
        return
    trained = trained[trained["learning_rate"].notna() & trained["adapter_sha256"].notna()]
    same = trained[trained.duplicated(["base_model", "adapter_sha256"], keep=False)]
    if len(same):
        yield _row(
            "one_seed",
            "error",
            same["run_id"],
            f"trained runs with the adapter of another run, byte for byte: {len(same)} of"
            f" {len(trained)}, under {same['adapter_sha256'].nunique()} hashes"
            f" ({_named(same['run_id'])}). A seed or a setting did not reach the trainer, or files"
            " were copied: train them again.",
        )


def _repetitions(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of runs with the same setting."""
    groups = [group.tolist() for _, group in runs.groupby("setting")["run_id"]]
    return [(a, b) for group in groups for i, a in enumerate(group) for b in group[:i]]


def _curves_in_step(given: dict, trained: pd.DataFrame) -> Iterator[dict]:
    """Repetitions whose training losses rise and fall together: Spearman's correlation of the steps
    of the curves' second half, one-sided.

    The first half is left out, where every curve falls for the same reason. Distinct seeds draw
    distinct batches, so that the rest of the noise is theirs alone; one seed draws the same batches
    in the same order, whatever the init.
    """
    curves = given.get("curves")
    if curves is None or curves.empty:
        yield _unchecked("curves_in_step", "there are no training curves")
        return
    rows = curves[curves["split"].eq("train") & curves["run_id"].isin(trained["run_id"])]
    losses = rows.astype({"loss": float}).pivot(index="run_id", columns="step", values="loss")
    at, values = {run: i for i, run in enumerate(losses.index)}, losses.to_numpy()
    pairs = _repetitions(trained[trained["run_id"].isin(losses.index)])
    both = {pair: values[[at[pair[0]], at[pair[1]]]] for pair in pairs}
    both = {pair: part[:, ~np.isnan(part).any(0)] for pair, part in both.items()}
    pairs = [pair for pair, part in both.items() if part.shape[1] >= 16]
    if not pairs:
        yield _unchecked(
            "curves_in_step", "no two repetitions have training curves of 16 common steps"
        )
        return
    found = pd.DataFrame(
        [(*pair, *_in_step(both[pair])) for pair in pairs], columns=["a", "b", "r", "p"]
    )
    found["adjusted"] = holm(found["p"])
    alike = found[found["r"].ge(IN_STEP) & found["adjusted"].le(SHARES["one_seed"] * ALPHA)]
    if len(alike):
        runs = sorted({*alike["a"], *alike["b"]})
        yield _row(
            "one_seed",
            "error",
            runs,
            "pairs of repetitions whose training losses rise and fall together step by step:"
            f" {len(alike)} of {len(pairs)} (rank correlation from {alike['r'].min():.2f};"
            f" {_named(runs)}). They saw the same batches in the same order, as one seed gives:"
            " check that the seed reaches the data's order.",
            alike["r"].min(),
            alike["p"].max(),
            alike["adjusted"].max(),
        )


def _in_step(losses: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation of the steps of the second half of two curves, and its one-sided p; no
    correlation where one does not move.
    """
    steps = np.diff(losses[:, losses.shape[1] // 2 :], axis=1)
    if (np.ptp(steps, axis=1) < 1e-12).any():
        return np.nan, 1.0
    r, p = pearsonr(*rankdata(steps, axis=1), alternative="greater")
    return float(r), float(p)


def _same_answers(given: dict, trained: pd.DataFrame) -> Iterator[dict]:
    """Repetitions that answer every prompt alike though training did change the model."""
    of = given["answers_of"]
    if "length" not in of:
        yield _unchecked("same_answers", "there are no verdicts, so no answers to compare")
        return
    if of["length"].nunique().max() < 2:
        yield _unchecked("same_answers", "answers to a prompt are all of one length")
        return
    moved = trained[trained["run_id"].isin(of["length"].index) & trained["learning_rate"].notna()]
    if "no_op" in moved:
        moved = moved[_numbers(moved["no_op"]) != 1]
    pairs = _repetitions(moved)
    equal = _equal(of, [a for a, _ in pairs], [b for _, b in pairs]) if pairs else np.zeros(0)
    base = (
        given["ran"][given["ran"]["method"].eq("none")]
        .drop_duplicates("base_model")
        .set_index("base_model")["run_id"]
    )
    base = base[base.isin(of["length"].index)]
    home = moved.set_index("run_id")["base_model"].map(base)
    copies = [
        pair
        for pair, share in zip(pairs, equal, strict=True)
        if share == 1
        and (pd.isna(home[pair[0]]) or _equal(of, [pair[0]], [home[pair[0]]])[0] < NEARLY_ALL)
    ]
    if copies:
        runs = sorted({run for pair in copies for run in pair})
        yield _row(
            "one_seed",
            "error",
            runs,
            f"pairs of repetitions that answer all {of['length'].shape[1]} prompts alike, and not"
            f" as the base model does: {len(copies)} of {len(pairs)} ({_named(runs)}). Distinct"
            " seeds do not: check that the seed reaches init, data order and dropout, and that no"
            " answers were copied.",
        )


# ---- 4 drift between rounds
def drift(given: dict) -> Iterator[dict]:
    """Rounds (repetitions) that differ in all runs of a base model alike: in the unsafe-response
    rates of all settings, and in what no-ops answer.

    Rates: each method's round means, with the variance that is left within the method when settings
    and rounds are taken out, corrected for what settings that share a seed have in common; methods
    are weighted by their precision with Meier's correction for estimated weights (1953, Biometrics
    9:59, eq. for k means), and the round effects tested by F. A round must also lie DRIFT_POINTS
    apart.
    """
    of, ran = given["answers_of"], given["ran"]
    yield from _no_ops_disagree(given)
    tables = {}
    if "repetition" in ran and "unsafe" in of:
        trained = _as_trained(
            ran[ran["method"].ne("none") & ran["run_id"].isin(of["unsafe"].index)]
        )
        asked = _harmful(of["unsafe"].columns, given.get("prompts"))
        rate = 100 * of["unsafe"].loc[trained["run_id"], asked].mean(axis=1).to_numpy()
        tables = {
            base_model: _rounds(part)
            for base_model, part in trained.assign(rate=rate).groupby("base_model", sort=False)
        }
        tables = {
            base_model: wide
            for base_model, wide in tables.items()
            if wide.shape[1] > 1 and wide.groupby("method").size().gt(1).any()
        }
    if not tables:
        yield _unchecked(
            "drift",
            "no base model has verdicts of two settings of one method in the same two rounds",
        )
        return
    found = _tested_rounds(tables, 100 / asked.sum())
    for row in found[
        found["adjusted"].le(SHARES["drift"] * ALPHA) & found["apart"].abs().ge(DRIFT_POINTS)
    ].itertuples():
        yield _row(
            "drift",
            "error",
            f"{row.base_model} round {row.round:g}",
            f"round {row.round:g} of {row.base_model} lies {row.apart:+.1f} points in the"
            f" unsafe-response rate from the other rounds of the same {row.n} settings (F ="
            f" {row.F:.1f}, p = {row.p:.1g}): something other than the seed changed between rounds."
            " Score the base model again in each round, and compare within rounds.",
            row.F,
            row.p,
            row.adjusted,
        )


def _as_trained(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with their settings by the learning rate that was read back, where one was: a wrong
    label in one round would pass for drift.

    No-ops are a method of their own, since their spread is not that of runs that were trained.
    """
    done = runs.get("learning_rate", pd.Series(np.nan, runs.index)).astype(float)
    if "trained_learning_rate" in runs:
        done = pd.Series(_numbers(runs["trained_learning_rate"]), runs.index).fillna(done)
    still = _numbers(runs["no_op"]) == 1 if "no_op" in runs else np.zeros(len(runs), bool)
    method = runs["method"].astype(str) + np.where(still, ", no-op", "")
    return runs.assign(
        setting=[f"{alike} {rate:.3g}" for alike, rate in zip(runs["alike"], done, strict=True)],
        method=method,
    )


def _rounds(runs: pd.DataFrame) -> pd.DataFrame:
    """Settings (by method, alike, setting) x rounds: the rates, for the settings that have the
    rounds which most settings have.
    """
    wide = runs.pivot_table(
        index=["method", "alike", "setting"], columns="repetition", values="rate"
    )
    usual = wide.notna().value_counts()  # the rounds that a setting has, the most frequent first
    return wide.loc[:, list(usual.index[0])].dropna() if len(usual) else wide


def _tested_rounds(tables: dict[str, pd.DataFrame], grain: float) -> pd.DataFrame:
    """A row per base model: n settings, F, p, adjusted (Holm over base models), round, apart."""
    shared = _shared_by_seed(tables)
    parts = pd.DataFrame(
        [
            {"base_model": base_model, **part}
            for base_model, wide in tables.items()
            for part in _round_means(wide, grain, shared)
        ]
    )
    parts = _moderated(parts) if len(parts) else parts
    rows = (
        [
            {
                "base_model": base_model,
                "n": len(tables[base_model]),
                **_round_effects(own, tables[base_model].columns),
            }
            for base_model, own in parts.groupby("base_model", sort=False)
        ]
        if len(parts)
        else []
    )
    found = pd.DataFrame(rows, columns=["base_model", "n", "F", "p", "round", "apart"])
    return found.assign(adjusted=holm(found["p"]) if len(found) else [])


def _shared_by_seed(tables: dict[str, pd.DataFrame]) -> float:
    """The correlation of settings that differ in the rate alone, and so may share a seed's init and
    data order, beyond that of other settings.

    Covariances within methods, pooled in units of each method's variance: (mates - others) / (own -
    others), which a drift common to all settings leaves alone; and one standard error (jackknife
    over base models and methods) more, since too little would raise false alarms. 1 where no method
    has settings of two kinds, so that it cannot be told.
    """
    parts = []
    for wide in tables.values():
        for _, part in wide.sub(wide.mean(axis=1), axis=0).groupby("method"):
            cov, alike = (
                part.to_numpy() @ part.to_numpy().T,
                part.index.get_level_values("alike").to_numpy(),
            )
            mates, own = alike[:, None] == alike, np.eye(len(part), dtype=bool)
            if (mates & ~own).any() and (~mates).any() and np.trace(cov) > 0:
                parts.append(
                    [
                        cov[mates & ~own].mean() - cov[~mates].mean(),
                        cov[own].mean() - cov[~mates].mean(),
                    ]
                    / cov[own].mean()
                )
    top, bottom = np.array(parts).sum(0) if parts else (0.0, 0.0)
    if bottom <= 0:
        return 1.0
    without = [(top - a) / (bottom - b) for a, b in parts] if len(parts) > 1 else [1.0]
    return float(np.clip(top / bottom + np.sqrt((len(parts) - 1) * np.var(without)), 0, 1))


def _round_means(wide: pd.DataFrame, grain: float, shared: float) -> list[dict]:
    """Per method of a base model: the rounds' mean deviations from their settings' means, the
    variance left between settings, and its df.

    n: how many independent settings the mean is worth, where settings that share their seeds have
    the correlation `shared`.
    """
    found = []
    for method, part in wide.sub(wide.mean(axis=1), axis=0).groupby("method"):
        n, effect = len(part), part.mean().to_numpy()
        mates = shared * ((part.groupby("alike").size().to_numpy() ** 2).sum() / n - 1)
        if n - 1 > mates:  # else the settings are one, which says nothing about the variance
            variance = float(((part - effect) ** 2).to_numpy().sum()) / (
                (n - 1 - mates) * (len(effect) - 1)
            )
            df = (n - 1) * (len(effect) - 1) / (1 + shared * mates)
            found.append(
                {
                    "method": method,
                    "effect": effect,
                    "variance": max(variance, grain**2),
                    "df": df,
                    "n": n / (1 + mates),
                }
            )
    return found


def _moderated(parts: pd.DataFrame) -> pd.DataFrame:
    """The variances of a method in several base models drawn together as far as they are alike,
    with their df.

    Smyth (2004, Stat. Appl. Genet. Mol. Biol. 3:3, section 6.2): the prior df solves trigamma(d0 /
    2) = the variance of log s2 less what the df explain; here that variance is pooled over methods,
    each of which has its own prior mean. No more df than the method has in all.
    """
    half = parts["df"] / 2
    log = np.log(parts["variance"]) - digamma(half) + np.log(half)
    methods = parts["method"]
    mean, free = log.groupby(methods).transform("mean"), len(parts) - methods.nunique()
    if free < 1:
        return parts
    excess = ((log - mean) ** 2).sum() / free - polygamma(1, half).mean()
    d0 = 2 * brentq(lambda x: polygamma(1, x) - excess, 1e-3, 1e6) if excess > 2e-6 else 1e6
    prior = np.exp(mean + digamma(d0 / 2) - np.log(d0 / 2))
    total = parts.groupby("method")["df"].transform("sum")
    several = methods.map(methods.value_counts()).gt(1)
    variance = ((d0 * prior + parts["df"] * parts["variance"]) / (d0 + parts["df"])).where(
        several, parts["variance"]
    )
    return parts.assign(
        variance=variance, df=np.minimum(d0 + parts["df"], total).where(several, parts["df"])
    )


def _round_effects(parts: pd.DataFrame, rounds: pd.Index) -> dict[str, float]:
    """F and p of round effects common to the methods of a base model, and the round that lies
    farthest from the mean of the others.
    """
    weight, df, n = (
        (parts["n"] / parts["variance"]).to_numpy(),
        parts["df"].to_numpy(),
        len(rounds) - 1,
    )
    share, effect = (
        weight / weight.sum(),
        np.average(np.stack(parts["effect"]), axis=0, weights=weight),
    )
    meier = 1 + 4 * (share * (1 - share) / df).sum()
    f, at = weight.sum() * (effect**2).sum() / n / meier, int(np.abs(effect).argmax())
    p = f_distribution.sf(f, n, 1 / (share**2 / df).sum())
    return {
        "F": float(f),
        "p": float(p),
        "round": rounds[at],
        "apart": float(effect[at] - np.delete(effect, at).mean()),
    }


def _no_ops_disagree(given: dict) -> Iterator[dict]:
    """No-ops of a base model, and the base itself where it was scored again, of which those of one
    round agree less with the others' than all else.

    Only pairs of different settings count, whose trainings have nothing but the round in common.
    Tested over prompts, each round against the rest. A tenth of the agreement must also be lost.
    """
    ran, of = given["ran"], given["answers_of"]
    again = ran["method"].eq("none") & ran.groupby(["base_model", "method"])["run_id"].transform(
        "size"
    ).gt(1)
    known = ran[
        again | (pd.Series(_numbers(ran["no_op"]) == 1, ran.index) if "no_op" in ran else False)
    ]
    known = (
        known[known["run_id"].isin(of["length"].index)]
        if "length" in of and "repetition" in known
        else known[:0]
    )
    rows = [
        {"base_model": base_model, **row}
        for base_model, runs in known.groupby("base_model", sort=False)
        for row in _odd_rounds(runs, of)
    ]
    if not rows:
        yield _unchecked(
            "no_ops_disagree",
            "no base model has no-ops of two settings in two rounds; score the base model again in"
            " each round to see drift plainly",
        )
        return
    found = pd.DataFrame(rows)
    found["adjusted"] = holm(found["p"])
    found = found.sort_values("gap", ascending=False).drop_duplicates(
        "base_model"
    )  # the other rounds disagree with the odd one too
    for row in found[
        found["adjusted"].le(SHARES["no_ops_disagree"] * ALPHA)
        & found["between"].le((1 - DRIFT_SHARE) * found["within"])
    ].itertuples():
        yield _row(
            "drift",
            "error",
            f"{row.base_model} round {row.round:g}",
            f"runs of {row.base_model} that training left as they were ({row.n}) have answers of"
            f" exactly the same length on {100 * row.between:.1f} % of prompts between round"
            f" {row.round:g} and the others, and on {100 * row.within:.1f} % otherwise (t ="
            f" {row.t:.1f}): the rounds were not run alike (texts, template, decoding or machine)."
            " Compare within rounds only.",
            row.t,
            row.p,
            row.adjusted,
        )


def _odd_rounds(runs: pd.DataFrame, of: dict[str, pd.DataFrame]) -> Iterator[dict]:
    """For each round: how runs of other settings agree across its border (between), and on either
    side of it (within).
    """
    place, rounds, setting = (
        np.triu_indices(len(runs), 1),
        runs["repetition"].to_numpy(),
        runs["setting"].to_numpy(),
    )
    values, nats = (
        of["length"].loc[runs["run_id"]].to_numpy(),
        _agreement(of, runs["run_id"].tolist())[place],
    )
    equal, apart = values[place[0]] == values[place[1]], setting[place[0]] != setting[place[1]]
    for one in np.unique(rounds):
        across = (rounds[place[0]] == one) != (rounds[place[1]] == one)
        if (apart & across).any() and (apart & ~across).any():
            gap = nats[apart & ~across].mean(0) - nats[apart & across].mean(0)
            t, p = _t(gap, of["family"].to_numpy())
            yield {
                "round": one,
                "n": len(runs),
                "gap": gap.mean(),
                "within": equal[apart & ~across].mean(),
                "between": equal[apart & across].mean(),
                "t": t,
                "p": p,
            }


# ---- 5 echoed prompts
def echo(given: dict) -> Iterator[dict]:
    """Runs whose responses begin with their own prompt: by the texts where they are given, else by
    lengths against the prompts' lengths.

    `texts` has benchmark, prompt_id, prompt. No text is shown. Without it nothing is certain;
    repetitions whose answers are nearly all longer than those of the other repetitions of their
    setting are noted.
    """
    responses, texts, of = given.get("responses"), given.get("texts"), given["answers_of"]
    if texts is not None and responses is not None and len(responses):
        share = echoed(responses, texts)
        runs = share.index[share.ge(ECHO_SHARE)]
        usual = share.drop(runs).median() if len(share) > len(runs) else np.nan
        if len(runs):
            yield _row(
                "echo",
                "error",
                runs,
                f"runs that repeat their prompt at the beginning of responses: {len(runs)} of"
                f" {len(share)} ({_named(runs)}), in {100 * share[runs].min():.0f} to"
                f" {100 * share[runs].max():.0f} % of them (median of the other runs"
                f" {100 * usual:.1f} %). The judge read the prompt as the answer: cut it off and"
                " judge again.",
            )
        return
    yield _unchecked(
        "echo",
        "the texts of prompts and responses are not given; lengths alone do not tell an echo from a"
        " longer answer",
    )
    if texts is not None and "length" in of:
        yield from _length_follows_prompt(given, texts)
    if "length" in of:
        yield from _shifted(given)


def echoed(responses: pd.DataFrame, texts: pd.DataFrame) -> pd.Series:
    """The share of each run's responses that begin with the first 40 characters of their own prompt
    (the whole one if shorter), case and space aside.
    """
    start = _plain(texts["prompt"]).str[:ECHO_START].rename("start")
    prompts = texts[["benchmark", "prompt_id"]].astype(object).assign(start=start)
    rows = (
        responses[["run_id", "benchmark", "prompt_id", "response"]]
        .astype(object)
        .merge(prompts, on=["benchmark", "prompt_id"])
    )
    found = [
        bool(start) and response.startswith(start)
        for response, start in zip(_plain(rows["response"]), rows["start"], strict=True)
    ]
    return pd.Series(found, rows.index).groupby(rows["run_id"].to_numpy()).mean()


def _plain(texts: pd.Series) -> pd.Series:
    return texts.astype(object).fillna("").map(lambda text: " ".join(text.split()).casefold())


def _length_follows_prompt(given: dict, texts: pd.DataFrame) -> Iterator[dict]:
    """Runs whose answers are longer than those of the base model's other runs, and more so the
    longer the prompt: Spearman's correlation, one-sided.

    It sees an echo where runs answer nearly alike; where answers vary by more than the prompts'
    length, it does not.
    """
    of, rows = given["answers_of"], []
    asked = (
        texts.astype({"benchmark": object, "prompt_id": object})
        .set_index(["benchmark", "prompt_id"])["prompt"]
        .astype(object)
        .str.len()
        .astype(float)
    )
    asked = asked.reindex(of["length"].columns).to_numpy()
    for _, runs in given["ran"][given["ran"]["run_id"].isin(of["length"].index)].groupby(
        "base_model", sort=False
    ):
        length = of["length"].loc[runs["run_id"]].to_numpy()
        excess = length - np.nanmedian(length, axis=0)
        for run_id, one in zip(runs["run_id"], excess, strict=True):
            there = ~np.isnan(one) & ~np.isnan(asked)
            if there.sum() > 3 and np.ptp(one[there]) > 0 and np.ptp(asked[there]) > 0:
                rows.append(
                    (
                        run_id,
                        *pearsonr(
                            rankdata(one[there]), rankdata(asked[there]), alternative="greater"
                        ),
                        (one[there] > 0).mean(),
                    )
                )
    found = pd.DataFrame(rows, columns=["run_id", "r", "p", "longer"])
    found["adjusted"] = holm(found["p"]) if len(found) else []
    alike = found[found["longer"].ge(2 / 3) & found["adjusted"].le(SHARES["echo"] * ALPHA)]
    for row in alike.itertuples():
        yield _row(
            "echo",
            "warning",
            row.run_id,
            f"answers of {row.run_id} are longer than those of other runs on {100 * row.longer:.0f}"
            " % of the prompts, and the more so the longer the prompt (rank correlation"
            f" {row.r:.2f}): it may repeat its prompts. Look at its texts.",
            row.r,
            row.p,
            row.adjusted,
        )


def _shifted(given: dict) -> Iterator[dict]:
    """Repetitions with longer (or shorter) answers than the others of their setting on nine prompts
    of ten.
    """
    of, ran = given["answers_of"], given["ran"]
    rows = []
    for _, runs in ran[ran["run_id"].isin(of["length"].index)].groupby("setting"):
        length = of["length"].loc[runs["run_id"]].to_numpy()
        for i, run_id in enumerate(runs["run_id"]) if len(runs) > 1 else ():
            gap = length[i] - np.nanmedian(np.delete(length, i, axis=0), axis=0)
            rows.append((run_id, (gap > 0).mean(), (gap < 0).mean()))
    found = pd.DataFrame(rows, columns=["run_id", "longer", "shorter"])
    odd = found[(found["longer"] >= 0.9) | (found["shorter"] >= 0.9)]
    if len(odd):
        yield _row(
            "lengths_shifted",
            "note",
            odd["run_id"],
            f"runs whose answers are longer ({odd['longer'].ge(0.9).sum()}) or shorter"
            f" ({odd['shorter'].ge(0.9).sum()}) than those of the other repetitions of their"
            f" setting on nine prompts of ten ({_named(odd['run_id'])}), as they would be if only"
            " some of them repeated their prompts. Look at the texts.",
        )


# ---- 6 what the data cannot say
def repaired(given: dict) -> Iterator[dict]:
    """Repairs that took away all of the fine-tuning."""
    runs = given["planned"][given["planned"]["repaired"] & given["planned"]["status"].eq("ok")]
    whole = runs[_numbers(runs["no_op"]) == 1] if "no_op" in runs else runs[:0]
    if len(whole):
        names = whole["mitigation"].value_counts()
        yield _row(
            "undone",
            "note",
            whole["run_id"],
            "repaired runs that are the base model again, nothing of the fine-tuning being left:"
            f" {len(whole)} of {len(runs)}"
            f" ({_named([f'{name}: {n}' for name, n in names.items()], 6)}). They answer as safely"
            " as it does, and have lost what was gained.",
        )


def design(given: dict) -> Iterator[dict]:
    """Repeated rows, runs that failed or were never judged, one repetition, one base model, cells
    of the grid that nobody ran.
    """
    for name, n in given["repeated"].items():
        if n:
            yield _row(
                "duplicated_rows",
                "error",
                name,
                f"rows of {name} that repeat the key of another row: {n}; the first of each is used"
                " here. Find what wrote them twice.",
            )
    planned, ran, of = given["planned"], given["ran"], given["answers_of"]
    lost = planned[planned["status"].ne("ok")]
    for (base_model, method), runs in lost.groupby(["base_model", "method"], sort=False):
        whole = runs[~runs["setting"].isin(ran["setting"])]
        yield _row(
            "failed_runs",
            "warning" if len(whole) else "note",
            runs["run_id"],
            f"runs of {method} on {base_model} that failed or never ran: {len(runs)}"
            f" ({_named(runs['run_id'])}). "
            + (
                f"Settings without any run left: {whole['setting'].nunique()}. What is left may be"
                f" selected on the outcome: say so beside every mean of {method}."
                if len(whole)
                else "Their settings have other runs left."
            ),
        )
    if of:
        ended = planned.loc[planned["status"].eq("ok"), "run_id"]
        unjudged = ended[~ended.isin(of["asked"].index)]
        if len(unjudged):
            yield _row(
                "not_judged",
                "warning",
                unjudged,
                f"runs that ended well and have no verdict: {len(unjudged)} ({_named(unjudged)})."
                " Run the judge's notebook for them.",
            )
    trained = ran[ran["method"].ne("none")]
    alone = trained[trained.groupby("setting")["run_id"].transform("size").eq(1)]
    if len(alone):
        every = len(alone) == len(trained)
        yield _row(
            "one_repetition",
            "warning" if every else "note",
            alone["run_id"],
            f"settings run with one seed only: {alone['setting'].nunique()} of"
            f" {trained['setting'].nunique()} ({_named(alone['run_id'])}). Nothing can be said"
            " about other seeds there: intervals cover prompts alone.",
        )
    if ran["base_model"].nunique() == 1:
        yield _row(
            "one_base_model",
            "note",
            ran["base_model"].iloc[0],
            f"there is one base model, {ran['base_model'].iloc[0]}: nothing can be said about"
            " others, and no interaction with the base is estimable.",
        )
    yield from _missing_cells(trained)


def _missing_cells(trained: pd.DataFrame) -> Iterator[dict]:
    """Settings that some base models have and others lack."""
    names = [
        name
        for name in ("method", "objective", "dataset", "learning_rate", "epochs", "init")
        if name in trained and trained[name].notna().any()
    ]
    label = (
        trained[names]
        .astype(object)
        .where(trained[names].notna(), "")
        .astype(str)
        .agg(" ".join, axis=1)
        if len(trained)
        else pd.Series(dtype=object)
    )
    grid = pd.crosstab(label, trained["base_model"])
    gaps = [
        f"{base_model} x {cell.strip()}"
        for cell, row in grid.iterrows()
        for base_model in grid.columns
        if not row[base_model]
    ]
    if gaps:
        yield _row(
            "missing_cells",
            "note",
            gaps,
            f"cells of the grid that were never run: {len(gaps)} ({_named(gaps)}). Means over base"
            " models leave these settings out, and their interactions are not estimable.",
        )


def scored(given: dict) -> Iterator[dict]:
    """Answers without a verdict: everywhere, in a group, or more than the base model has; prompts
    that not every run was asked.
    """
    of, ran, verdicts = given["answers_of"], given["ran"], given.get("verdicts")
    if not of or "unsafe" not in of:
        yield _unchecked("unscored", "there are no verdicts")
        return
    for judge, rows in verdicts.groupby(
        "judge" if "judge" in verdicts else np.repeat("the judge", len(verdicts))
    ):
        share = np.isnan(_numbers(rows["unsafe"])).mean()
        if share > UNSCORED:
            yield _row(
                "unscored",
                "warning",
                judge,
                f"{judge} left {100 * share:.1f} % of {len(rows)} answers without a verdict: every"
                " rate is of the rest. Read the bounds that put them at either extreme.",
            )
    null = of["unsafe"].isna().to_numpy() & of["asked"].to_numpy(bool)
    benchmarks = of["unsafe"].columns.get_level_values(0)
    for benchmark in benchmarks.unique():
        part, asked = (
            null[:, benchmarks == benchmark],
            of["asked"].to_numpy(bool)[:, benchmarks == benchmark],
        )
        silent = of["unsafe"].index[(part.sum(1) == asked.sum(1)) & asked.any(1)]
        if len(silent):
            yield _row(
                "all_null",
                "error",
                silent,
                f"runs without a verdict on any prompt of {benchmark}: {len(silent)}"
                f" ({_named(silent)}). Nothing can be said about them there; their means are null,"
                " not 0.",
            )
    share = pd.Series(null.sum(1) / of["asked"].to_numpy().sum(1), of["unsafe"].index)
    base = (
        ran[ran["method"].eq("none")]
        .drop_duplicates("base_model")
        .set_index("base_model")["run_id"]
        .map(share)
    )
    more = ran[
        _numbers(ran["run_id"].map(share)) - _numbers(ran["base_model"].map(base).astype(float))
        > UNSCORED
    ]
    if len(more):
        yield _row(
            "unscored_differs",
            "warning",
            more["run_id"],
            f"runs with over {100 * UNSCORED:.0f} points more unscored answers than their base"
            f" model: {len(more)} ({_named(more['run_id'])}; up to"
            f" {100 * share[more['run_id']].max():.0f} %). Their changes compare different prompts:"
            " read their bounds.",
        )
    asked = of["asked"].sum(axis=1)
    fewer = asked.index[asked < asked.max()]
    if len(fewer):
        yield _row(
            "fewer_prompts",
            "warning",
            fewer,
            f"runs asked fewer prompts than the others: {len(fewer)} ({_named(fewer)};"
            f" {asked.min():.0f} against {asked.max():.0f}). Compare on the prompts in common.",
        )


def extremes(given: dict) -> Iterator[dict]:
    """Categories in which the base model's rate is 0 or 100 %, or no run's differs: what can only
    rise or fall, and what cannot be fitted.
    """
    rates, ran = given.get("rates"), given["ran"]
    if rates is None or rates.empty:
        yield _unchecked("category_at_bound", "there is no table of rates")
        return
    rates = rates[rates["outcome"].eq("unsafe")] if "outcome" in rates else rates
    rates = rates.assign(k=_numbers(rates["k"]), n_scored=_numbers(rates["n_scored"])).merge(
        ran[["run_id", "base_model", "method"]], on="run_id"
    )
    base = rates[rates["method"].eq("none") & rates["n_scored"].gt(0)]
    at = base[base["k"].eq(0) | base["k"].eq(base["n_scored"])]
    if len(at):
        names = (at["base_model"].astype(str) + ": " + at["category"].astype(str)).unique()
        yield _row(
            "category_at_bound",
            "note",
            names,
            f"categories in which a base model's unsafe-response rate is 0 or 100 %: {len(names)}"
            f" ({_named(names)}). There it can only rise or only fall, and a mean change is"
            " one-sided.",
        )
    total = rates.groupby(["base_model", "category"])[["k", "n_scored"]].sum()
    flat = total[total["n_scored"].gt(0) & (total["k"].eq(0) | total["k"].eq(total["n_scored"]))]
    if len(flat):
        names = [f"{base_model}: {category}" for base_model, category in flat.index]
        yield _row(
            "category_without_variation",
            "note",
            names,
            f"categories in which all answers of a base model's runs are judged alike: {len(names)}"
            f" ({_named(names)}). Logistic effects are not finite there, and an interval must be an"
            " exact bound.",
        )
    void = total[total["n_scored"].eq(0)]
    if len(void):
        names = [f"{base_model}: {category}" for base_model, category in void.index]
        yield _row(
            "all_null",
            "error",
            names,
            f"categories without a scored answer: {len(names)} ({_named(names)}). Nothing can be"
            " said about them.",
        )


def base_scored_once(given: dict) -> Iterator[dict]:
    """Base models that were scored once beside several rounds of runs, or never."""
    ran = given["ran"]
    if "repetition" not in ran or ran[ran["method"].ne("none")]["repetition"].nunique() < 2:
        return
    counts = (
        ran[ran["method"].eq("none")]
        .groupby("base_model")
        .size()
        .reindex(ran["base_model"].unique(), fill_value=0)
    )
    for n, said in (
        (
            0,
            (
                "without a scored run of their own, so that every change rests on a number from"
                " elsewhere"
            ),
        ),
        (1, "scored once, so that a drift between rounds would count as the methods' effect"),
    ):
        names = counts.index[counts.eq(n)]
        if len(names):
            yield _row(
                "base_scored_once" if n else "base_not_scored",
                "note",
                names,
                f"base models {said}: {len(names)} ({_named(names)}). Score the base model in each"
                " round.",
            )


CHECKS = (
    recorded_settings,
    rates_from_answers,
    no_ops,
    repaired,
    one_seed,
    drift,
    echo,
    design,
    scored,
    extremes,
    base_scored_once,
)
