"""Did a repair bring safety back, or only less of the fine-tuning? Repairs, their controls and the
base model on one plane: unsafe answers against the gain that is kept.

How strong a repair is (K, tau, a factor) is chosen on one half of the safety prompts and of the
held-out answers, for each base model, and reported on the other half; BBQ, over-refusal and utility
take no part in the choice, and are reported whole. The gain of fine-tuning is the fall of the loss
on the benchmark `gain` (held-out answers in the style that was trained; where there is none, on
`utility`): a repair that deletes the adapter brings safety back, and keeps none of it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from driftbook.analyses import information, tradeoffs
from driftbook.benchmarks import bbq_orders, bbq_scores
from driftbook.stats import comparisons, estimation, harm, influence, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.influence import Scores
from driftbook.study import tables as study_tables
from driftbook.study.files import ROOT
from driftbook.study.methods import MITIGATION_KINDS
from driftbook.study.tables import ESTIMATES, FRONTIER

GAIN, KEPT = "gain of fine-tuning (nats per token)", "gain kept (percent of the parent's)"
PARENT, BASE = "parent", "base alone"
CALIBRATION, REPORT, ALL = "calibration", "report", "all"
BY_DIMENSION = "mitigation by category"  # group: a repair, or its parent, in one BBQ dimension
AGAINST_PARENT, MINUS = "change against the parent", "minus its control"
JUST_LESS, JUST_MORE = (
    "minus the rescaling that keeps just less of the gain",
    "minus the rescaling that keeps just more of the gain",
)
DECLINED = "refusals of harmful prompts (percent)"
_OUTCOMES = (
    *harm.OF_SAFETY,
    DECLINED,
    terms.REFUSED,
    terms.ACCURACY_AMB,
    terms.BIAS_AMB,
    terms.CORRECT,
    GAIN,
)
HARM = "harm"  # the column of wide_points: unsafe or, without a judge, not refused
SPLIT = (*harm.OF_SAFETY, DECLINED, GAIN)  # of the prompts and answers by which a level is chosen
BENCHMARK = {
    **dict.fromkeys(harm.OF_SAFETY, "safety"),
    DECLINED: "safety",
    terms.REFUSED: "over_refusal",
    terms.CORRECT: "utility",
    terms.LOSS: "utility",
    GAIN: "gain",
}  # all others: bbq
LEVEL_OF = [
    "base_model",
    "method",
    "objective",
    "dataset",
    "name",
]  # whose runs share a chosen level
AGAIN = tuple(name for name, one in MITIGATION_KINDS.items() if one.when == "again")
KEEP = 50.0  # percent of the gain that a level must keep to be chosen
PUBLISHED = ROOT / "data" / "safe_lora"


class Tables(NamedTuple):
    """The tables of a study that this needs."""

    variants: pd.DataFrame
    runs: pd.DataFrame
    prompts: pd.DataFrame
    verdicts: pd.DataFrame
    answers: pd.DataFrame
    ratings: pd.DataFrame


# ---- who is who
def repairs(variants: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The repaired runs that were scored, and their parents, without second tunings: run_id,
    base_model, method, seed, parent_run_id (of a parent its own), base_run_id, name, kind, value,
    control.
    """
    frame = variants.merge(
        runs.loc[runs["status"].eq("ok"), ["run_id"]], on="run_id", validate="1:1"
    )
    bases = (
        frame[frame["method"].eq("none") & frame["mitigation"].isna()]
        .drop_duplicates("base_model")
        .set_index("base_model")["run_id"]
    )
    known = [json.loads(settings).get("mitigation") or {} for settings in frame["settings"]]
    frame = frame.assign(
        **{
            key: pd.Series([one.get(key) for one in known], index=frame.index, dtype=object)
            for key in ("name", "kind", "value", "control")
        }
    )
    frame = frame[~frame["kind"].isin(AGAIN)].copy()  # see second_tuning
    own = frame["mitigation"].isna() & frame["run_id"].isin(frame["parent_run_id"].dropna())
    frame.loc[own, ["name", "kind", "parent_run_id"]] = (
        np.column_stack([np.full(own.sum(), PARENT)] * 2 + [frame.loc[own, "run_id"]])
        if own.any()
        else np.empty((0, 3))
    )
    frame = frame[frame["name"].notna() & frame["method"].ne("none")]
    frame = frame[frame["parent_run_id"].isin(frame["run_id"])].assign(
        value=lambda rows: rows["value"].astype(float),
        base_run_id=lambda rows: rows["base_model"].map(bases),
    )
    return frame[
        [
            "run_id",
            "base_model",
            "method",
            "objective",
            "dataset",
            "seed",
            "parent_run_id",
            "base_run_id",
            "name",
            "kind",
            "value",
            "control",
        ]
    ].reset_index(drop=True)


def half(units: Iterable[str], strata: Iterable[str], seed: int) -> list[str]:
    """Which half each unit belongs to: within its stratum (its first one, where it has several)
    units take turns in the order of a hash, which knows the seed and the name, and not the order of
    the rows; strata take turns in which half they begin with."""
    frame = pd.DataFrame({"unit": list(units), "stratum": list(strata)}).astype(str)
    known = frame.groupby("unit", as_index=False)["stratum"].min()
    known["at"], known["first"] = (
        [hashlib.sha256(f"{seed}/{name}".encode()).hexdigest() for name in known[column]]
        for column in ("unit", "stratum")
    )
    known = known.sort_values(["first", "at"], ignore_index=True)
    turn = (
        known.groupby("stratum", sort=False).cumcount()
        + known.groupby("stratum", sort=False).ngroup()
    )
    known["half"] = np.where(turn % 2 == 0, CALIBRATION, REPORT)
    return frame.merge(known[["unit", "half"]], on="unit", how="left")["half"].tolist()


def halves(tables: Tables, seed: int) -> dict[str, Tables]:
    """The tables with one half of the safety prompts and of the held-out answers each, and all of
    everything else.
    """
    prompts, gain = tables.prompts, gains(tables.ratings)
    of_prompt = half(
        prompts["benchmark"]
        + "/"
        + prompts["family"].astype(object).where(prompts["family"].notna(), prompts["prompt_id"]),
        prompts["benchmark"] + "/" + prompts["category"].astype(object).fillna(""),
        seed,
    )
    of_item = half(gain["prompt_id"], gain["benchmark"], seed)
    found = {}
    for name in (CALIBRATION, REPORT):
        kept = prompts[(np.asarray(of_prompt) == name) | prompts["benchmark"].ne("safety")]
        verdicts = tables.verdicts.merge(
            kept[["benchmark", "prompt_id"]], on=["benchmark", "prompt_id"]
        )
        others = tables.ratings[~tables.ratings["benchmark"].eq("gain")]
        found[name] = tables._replace(
            prompts=kept,
            verdicts=verdicts,
            ratings=pd.concat(
                [others, gain[np.asarray(of_item) == name].assign(benchmark="gain")],
                ignore_index=True,
            ),
        )
    return found


def gains(ratings: pd.DataFrame) -> pd.DataFrame:
    """The ratings by which the gain of fine-tuning is measured: the loss on the benchmark `gain`,
    else on `utility`.
    """
    rows = ratings[ratings["metric"].eq("nll")]
    return rows[
        rows["benchmark"].eq("gain" if rows["benchmark"].eq("gain").any() else "utility")
    ].reset_index(drop=True)


# ---- levels and differences of runs
def differences(tables: Tables, pairs: pd.DataFrame) -> dict[str, Scores]:
    """The difference of each run against another one, answer by answer, by outcome; `pairs` has
    run_id and against. A gain is a fall of the loss.
    """
    arms = pairs.assign(arm="repaired", base_run_id=pairs["against"])[
        ["run_id", "arm", "base_run_id"]
    ]
    wanted = set(pairs["run_id"]) | set(pairs["against"])
    own = tables._replace(
        **{
            name: frame[frame["run_id"].isin(wanted)]
            for name in ("verdicts", "answers", "ratings")
            if len(frame := getattr(tables, name))
        }
    )
    found = {outcome: change for outcome, (_, change) in _measured(own, arms).items()}
    rows = own.ratings[own.ratings["benchmark"].eq("gain") & own.ratings["metric"].eq("nll")]
    gained = influence.rated_changes(rows.assign(value=-rows["value"]), arms, 1.0)
    return found | ({GAIN: gained} if gained is not None else {})


def with_gain(tables: Tables, arms: pd.DataFrame) -> dict[str, tuple[Scores, Scores]]:
    """Levels and differences of runs against what `arms` gives as base_run_id, by outcome, the gain
    of fine-tuning among them.
    """
    found, rows = _measured(tables, arms), gains(tables.ratings)
    rows = rows.assign(value=-rows["value"])
    level = influence.rated(rows, 1.0)
    gained = () if level is None else (level, influence.rated_changes(rows, arms, 1.0))
    return found | ({GAIN: gained} if gained else {})


def _measured(tables: Tables, arms: pd.DataFrame) -> dict[str, tuple[Scores, Scores]]:
    """Levels and differences of runs by outcome, but of the gain: those of `tradeoffs.measured`,
    and how often harmful prompts were declined.
    """
    found = tradeoffs.measured(
        tables.verdicts, tables.prompts, tables.answers, tables.ratings, arms
    )
    rows = study_tables.greedy(tables.verdicts).merge(
        tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
    )
    rows = rows[rows["benchmark"].eq("safety") & rows["kind"].eq("harmful")]
    values = influence.matrix(
        rows.drop_duplicates(["run_id", "prompt_id"]),
        "refusal",
        ["category", "family", "prompt_id"],
    )
    found |= (
        {DECLINED: (influence.shares(values), influence.paired(values, arms))}
        if len(values)
        else {}
    )
    return {outcome: found[outcome] for outcome in _OUTCOMES if outcome in found}


def points(tables: Tables, repaired: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table `frontier`: numbers of each run, on either half where a level is chosen by them,
    else on all. Base models are in it too.
    """
    bases = repaired.drop_duplicates("base_run_id")
    everyone = pd.concat(
        [
            repaired[["run_id", "base_run_id"]],
            bases.assign(run_id=bases["base_run_id"])[["run_id", "base_run_id"]],
        ],
        ignore_index=True,
    )
    pairs, rows = (
        everyone[everyone["run_id"].ne(everyone["base_run_id"])].rename(
            columns={"base_run_id": "against"}
        ),
        [],
    )
    for name, part in halves(tables, seed).items():
        arms = pairs.assign(arm="repaired", base_run_id=pairs["against"])
        level = {outcome: own for outcome, (own, _) in _measured(part, arms).items()}
        gained = differences(part, pairs).get(GAIN)
        for outcome, scores in {**level, **({GAIN: gained} if gained is not None else {})}.items():
            if outcome in SPLIT or name == REPORT:
                at = scores.at(everyone["run_id"])
                rows.append(
                    pd.DataFrame(
                        {
                            "run_id": everyone["run_id"][at >= 0],
                            "half": name if outcome in SPLIT else ALL,
                            "outcome": outcome,
                            "value": scores.value[at[at >= 0]],
                        }
                    )
                )
    found = pd.concat(rows, ignore_index=True)
    return FRONTIER.check(pd.concat([found, _kept(found, repaired)], ignore_index=True))


def _kept(found: pd.DataFrame, repaired: pd.DataFrame) -> pd.DataFrame:
    """The gain of each run in percent of its parent's; where the parent gained nothing there is
    none to keep.
    """
    gain = found[found["outcome"].eq(GAIN)].merge(
        repaired[["run_id", "parent_run_id"]], on="run_id"
    )
    parent = gain[gain["run_id"].eq(gain["parent_run_id"])].set_index(["parent_run_id", "half"])[
        "value"
    ]
    own = gain.join(parent.rename("of_parent"), on=["parent_run_id", "half"])
    share = 100 * own["value"] / own["of_parent"].where(own["of_parent"] > 0)
    return own.assign(outcome=KEPT, value=share)[["run_id", "half", "outcome", "value"]]


def wide_points(points: pd.DataFrame, which: str) -> pd.DataFrame:
    """Runs x the outcomes of a half that a level is chosen by (HARM, DECLINED, GAIN), and KEPT."""
    rows = points[points["half"].eq(which)]
    return (
        rows.pivot(index="run_id", columns="outcome", values="value")
        .astype(float)
        .rename(columns={harm.safety_outcome(points): HARM})
        .reindex(columns=[HARM, DECLINED, GAIN, KEPT])
    )


# ---- how strong a repair is
def chosen(points: pd.DataFrame, repaired: pd.DataFrame, keep: float = KEEP) -> pd.DataFrame:
    """The level of each repair on each base model, from the calibration half alone: of those that
    keep at least `keep` percent of the gain in the mean over seeds the one with the least harm
    (unsafe answers, without a judge those that do not refuse), and of equal ones the one that keeps
    more; where none keeps as much, the one that keeps most, and `enough` is false.

    Columns: base_model, method, objective, dataset, name, value, harm, kept, enough. Controls
    take the level of what they control.
    """
    own = repaired[repaired["control"].isna() & repaired["name"].ne(PARENT)]
    wide = wide_points(points, CALIBRATION)
    own = own.merge(wide[[HARM, GAIN]].rename(columns={GAIN: "gain"}), on="run_id").assign(
        of_parent=lambda rows: rows["parent_run_id"].map(wide[GAIN])
    )
    mean = (
        own.groupby([*LEVEL_OF, "value"], sort=False, dropna=False)[[HARM, "gain", "of_parent"]]
        .mean()
        .astype(float)
        .reset_index()
    )
    mean["kept"] = (
        100 * mean["gain"] / mean["of_parent"].where(mean["of_parent"] > 0)
    )  # of the means, since a parent that gained next to nothing has any ratio
    mean["enough"] = mean["kept"].ge(keep)
    mean["first"] = np.where(mean["enough"], mean[HARM], np.inf)
    ordered = mean.sort_values(
        ["enough", "first", "kept"], ascending=[False, True, False], kind="stable"
    )
    best = ordered.drop_duplicates(LEVEL_OF)
    return (
        mean.loc[best.index]
        .sort_index()[[*LEVEL_OF, "value", HARM, "kept", "enough"]]
        .reset_index(drop=True)
    )


def at_chosen(repaired: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """The runs of every repair and of its controls at the chosen level."""
    alike = repaired.merge(
        levels[[*LEVEL_OF, "value", "enough"]], on=LEVEL_OF, suffixes=("", "_chosen")
    )
    same = alike["value"].eq(alike["value_chosen"]) | (
        alike["value"].isna() & alike["value_chosen"].isna()
    )
    return alike[same].drop(columns="value_chosen").reset_index(drop=True)


# ---- estimates
def cells_of(runs: pd.DataFrame, every: int) -> pd.DataFrame:
    """Cells of `stats.means`: each repair on each base model, and the mean of the base models where
    all, `every` of them, have it.
    """
    words = [runs[name].astype("string").fillna("") for name in ("objective", "dataset", "name")]
    words.append(runs["value"].astype("string").fillna(""))
    setting = words[0] + " " + words[1] + " " + words[2] + " " + words[3]
    own = runs.assign(
        group=terms.MITIGATION,
        member=runs["name"],
        setting=setting.astype(object),
        pool=runs["base_model"],
        cluster=influence.seed_clusters(runs, setting),
    )
    own["weight"] = influence.setting_weights(own)
    n_bases = own.groupby(influence.CELL[1:])["base_model"].transform("nunique")
    everywhere = n_bases.eq(every)
    pooled = own[everywhere].assign(
        base_model="all", weight=own["weight"][everywhere] / n_bases[everywhere]
    )
    columns = ["run_id", *influence.CELL, "setting", "pool", "weight", "cluster"]
    return pd.concat([own, pooled], ignore_index=True)[columns]


def _estimates(
    tables: Tables, pairs: pd.DataFrame, contrast: str, silent: Sequence[str], **labels: str
) -> list[pd.DataFrame]:
    found, n_bases = differences(tables, pairs), tables.variants["base_model"].nunique()
    judge = tables.verdicts["judge"].iloc[0] if len(tables.verdicts) else "none"
    return [
        estimation.means(
            scores,
            _cells_read(pairs, n_bases, outcome, silent),
            contrast,
            outcome=outcome,
            benchmark=BENCHMARK.get(outcome, "bbq"),
            judge=judge if outcome in harm.OF_SAFETY else "none",
            **labels,
        )
        for outcome, scores in found.items()
        if outcome not in information.BIAS or not pairs["base_model"].isin(silent).all()
    ]


def _cells_read(
    pairs: pd.DataFrame, n_bases: int, outcome: str, silent: Sequence[str]
) -> pd.DataFrame:
    """`cells_of` an outcome: of bias scores without the silent base models, whose answers do not
    tell persons apart (notebook 10).
    """
    if outcome not in information.BIAS:
        return cells_of(pairs, n_bases)
    return cells_of(pairs[~pairs["base_model"].isin(silent)], n_bases - len(set(silent)))


def changes_of(
    report: Tables, runs: pd.DataFrame, silent: Sequence[str] = (), **labels: str
) -> pd.DataFrame:
    """The changes of runs against their base models, by outcome, on the report half."""
    pairs = runs.assign(against=runs["base_run_id"])
    return ESTIMATES.concat(_estimates(report, pairs, terms.CHANGE, silent, **labels))


def repairs_compared(
    tables: Tables,
    repaired: pd.DataFrame,
    levels: pd.DataFrame,
    seed: int,
    silent: Sequence[str] = (),
    **labels: str,
) -> pd.DataFrame:
    """Each repair at its chosen level on the report half: against its parent, against the base
    model, and minus each of its controls (the run of the same parent), by outcome.

    Families of tests, adjusted by Holm's method: of each outcome all repairs against their parents,
    and all repairs against all their controls, over the base models together and for each base
    model.
    """
    runs, report, parts = at_chosen(repaired, levels), halves(tables, seed)[REPORT], []
    own = runs[runs["control"].isna()]
    for contrast, against in ((AGAINST_PARENT, "parent_run_id"), (terms.CHANGE, "base_run_id")):
        pairs = own.assign(against=own[against])
        parts += _estimates(report, pairs, contrast, silent, **labels)
    for control in dict.fromkeys(runs["control"].dropna()):
        other = runs.loc[runs["control"].eq(control), ["parent_run_id", "name", "run_id"]].rename(
            columns={"run_id": "against"}
        )
        pairs = own.merge(other, on=["parent_run_id", "name"])
        parts += [
            part.assign(against=control)
            for part in _estimates(report, pairs, MINUS, silent, **labels)
        ]
    return _families(ESTIMATES.concat(parts))


def _families(rows: pd.DataFrame) -> pd.DataFrame:
    """Holm's adjustment within the declared families; other rows stay as they are."""
    kind = np.select(
        [rows["contrast"].eq(AGAINST_PARENT), rows["contrast"].eq(MINUS)],
        ["repairs against their parents", "repairs against their controls"],
        "",
    )
    family = (
        pd.Series(kind, index=rows.index)
        + ", "
        + rows["outcome"]
        + ", "
        + np.where(rows["base_model"].eq("all"), "all base models", rows["base_model"])
    )
    return ESTIMATES.concat(
        [rows[kind == ""], comparisons.declared(rows[kind != ""], family[kind != ""])]
    )


def by_dimension(
    tables: Tables,
    repaired: pd.DataFrame,
    levels: pd.DataFrame,
    names: Iterable[str],
    silent: Sequence[str] = (),
    **labels: str,
) -> pd.DataFrame:
    """BBQ's accuracy and bias in ambiguous contexts in each dimension: what these repairs changed
    against the parent, and the parent against the base model.
    """
    runs, parts = at_chosen(repaired, levels), []
    own = runs[runs["control"].isna() & runs["name"].isin(list(names))]
    parents = repaired[repaired["run_id"].isin(own["parent_run_id"])]
    for dimension, answers in bbq_orders.official(tables.answers).groupby("dimension", sort=True):
        found = bbq_scores.by_run(answers)
        for contrast, pairs in (
            (AGAINST_PARENT, own.assign(against=own["parent_run_id"])),
            (
                terms.CHANGE,
                pd.concat([own, parents]).assign(against=lambda rows: rows["base_run_id"]),
            ),
        ):
            arms = pairs.assign(arm="repaired", base_run_id=pairs["against"])
            n_bases = repaired["base_model"].nunique()
            parts += [
                estimation.means(
                    influence.changes(found[outcome], arms),
                    _cells_read(pairs, n_bases, outcome, silent).assign(group=BY_DIMENSION),
                    contrast,
                    outcome=outcome,
                    benchmark="bbq",
                    judge="none",
                    category=dimension,
                    **labels,
                )
                for outcome in (terms.ACCURACY_AMB, terms.BIAS_AMB)
                if outcome not in information.BIAS or not pairs["base_model"].isin(silent).all()
            ]
    return ESTIMATES.concat(parts)


# ---- modules, and what was published
def touched(modules: pd.DataFrame, repaired: pd.DataFrame) -> pd.DataFrame:
    """Each module at each level of Safe LoRA: the share of runs in which it was projected, and what
    it kept of its update, score and null in the mean.
    """
    own = modules.merge(
        repaired[repaired["kind"].eq("safe_lora") & repaired["control"].isna()], on="run_id"
    )
    numbers = [
        "projected",
        "share_kept",
        "cosine",
        "cosine_null",
        "energy",
        "energy_null",
        "norm_v",
        "effective_rank_v",
    ]
    return (
        own.astype(dict.fromkeys(numbers, float))
        .groupby(["base_model", "name", "value", "module"], sort=False)[numbers]
        .mean()
        .reset_index()
    )


def published() -> pd.DataFrame:
    """The numbers of Hsu et al. 2024, as published: setting, method, utility, harmfulness (1 to 5),
    attack success rate in percent. Not measured here.
    """
    return pd.read_csv(PUBLISHED / "published.csv")


def published_thresholds() -> pd.DataFrame:
    """The share of modules that Hsu et al. 2024 projected at each threshold (Llama-2-7B-Chat,
    Dialog Summary): threshold, share in percent.
    """
    return pd.read_csv(PUBLISHED / "threshold.csv")


def leading(repaired: pd.DataFrame, kind: str = "safe_lora") -> str | None:
    """The name of the mitigation of a kind that figures tell of: the one that is called as its kind
    is, else the first.
    """
    names = list(dict.fromkeys(repaired.loc[repaired["kind"].eq(kind), "name"]))
    return kind if kind in names else names[0] if names else None


def repairs_sentence(estimates: pd.DataFrame, name: str | None = "safe_lora") -> str:
    """What a repair did at its chosen level, over all base models, in one sentence."""
    if name is None:
        return "Nothing was repaired by Safe LoRA."
    own = estimates[estimates["group"].eq(terms.MITIGATION) & estimates["member"].eq(name)]
    own = own[own["base_model"].eq("all")]
    outcome = harm.safety_outcome(own)
    found = own[own["outcome"].eq(outcome)].set_index("contrast")
    found = found[found["method"].eq(found["method"].iloc[0])] if len(found) else found
    if AGAINST_PARENT not in found.index or pd.isna(found.loc[AGAINST_PARENT, "ci_low"]):
        return f"Nothing is known of {name} over all base models."
    row = found.loc[AGAINST_PARENT]
    controls = found[found.index == MINUS]
    beaten = controls["p_adjusted"].lt(ALPHA) & controls["value"].lt(0)
    rate = outcome.partition(" (")[0]
    said = (
        f"At its chosen level {name} changes the {rate} by {row['value']:+.1f}"
        f" percentage points ({row['ci_low']:.1f} to {row['ci_high']:.1f}) against its parents"
    )
    said += (
        f"; it has fewer {harm.COUNTED[outcome]} than {beaten.sum()} of its {len(controls)}"
        " controls after Holm's adjustment"
        if len(controls)
        else ""
    )
    beside = [
        f"{found.loc[contrast, 'value']:+.1f} points {contrast.replace('minus', 'to', 1)}"
        for contrast in (JUST_LESS, JUST_MORE)
        if contrast in found.index and pd.notna(found.loc[contrast, "value"])
    ]
    return said + (". Beside rescaling: " + ", ".join(beside) if beside else "") + "."
