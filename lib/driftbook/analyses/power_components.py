"""The parts of a study's error: spread of runs, of prompts, and of run x prompt."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd

from driftbook.analyses.tradeoffs import scaled
from driftbook.stats.influence import Scores
from driftbook.study.methods import METHOD_CLASS

# The original study (arXiv 2511.00382), by its true learning rates. `run`: SD of runs with equal
# settings, of the % safe over 330 prompts, in points, its square averaged
# over cells. It has no verdicts of its base models; its IA3 runs of SFT at 2e-5, which did nothing,
# stand for them: `noise` (SD of run x prompt) and `unit` (SD
# over prompts of the mean difference) of the other runs are shares of the base's own SD over
# prompts, sqrt(p (1 - p)), averaged over the four base models.
ORIGINAL = pd.DataFrame(
    {
        "method": ["lora", "ia3", "prompt_tuning", "p_tuning"],
        "run": [1.6, 1.7, 7.5, 13.5],
        "noise": [0.43, 0.39, 0.88, 0.75],
        "unit": [0.30, 0.30, 0.59, 0.65],
        "between_bases": [0.02, 0.0, 0.05, 0.03],
        "df_run": [44, 44, 43, 40],
    }
)
ORIGINAL_PROMPTS, ORIGINAL_CATEGORIES = 330, 11
COLUMNS = [
    "base_model",
    "method",
    "other",
    "rate",
    "run",
    "noise",
    "df_run",
    "unit",
    "icc",
    "between_bases",
    "df_unit",
    "how",
]


# ---- what varies
def components(scores: Scores, cells: pd.DataFrame) -> pd.DataFrame:
    """The components of variance of a study's own changes, in the unit of the scores: a row per
    base model, method and `other` (none: its base).

    `scores` are changes, `cells` the rows of one group of stats.cells. rate: the base model's own
    share in percent, null where the score is none; run: SD of runs with equal settings, without the
    noise of their prompts; noise: SD of run x unit within settings; unit: SD over units (within
    strata) of the mean change, or of the difference to the other method's, without noise; icc:
    correlation of two units of a family in it, 0 where there are no families; between_bases:
    correlation of the same unit's effect on two base models; df_*: how well each is known. run and
    noise are null where no setting was run twice: `how` says what follows.

    Raises:
        ValueError: the cells are of several groups.
    """
    single = cells[cells["base_model"].ne("all")].assign(
        position=lambda rows: scores.at(rows["run_id"])
    )
    known = single[single["position"].ge(0)]
    known = known[~np.isnan(scores.value[known["position"]])]
    if known.duplicated(["base_model", "method", "run_id"]).any():
        raise ValueError(
            "a run is in several cells of its base model and method; give the cells of one group"
            " only, such as 'as configured'"
        )
    methods, bases = list(dict.fromkeys(known["method"])), list(dict.fromkeys(known["base_model"]))
    views = [replace(scores, family=None), scores]  # a unit at a time, and a family at a time
    size = family_size(scores)
    arms = {
        key: _arm(scores, views, own)
        for key, own in known.groupby(["base_model", "method"], sort=False)
    }
    rows = []
    for method, other in _contrasts(methods):
        here = [
            base
            for base in bases
            if (base, method) in arms and (other == "none" or (base, other) in arms)
        ]
        effects = [_effect(arms[base, method], arms.get((base, other))) for base in here]
        common = _between_bases(effects)
        for base, effect in zip(here, effects, strict=True):
            arm = arms[base, method]
            spread = _spread(arm, effect, len(scores.strata), size)
            known = [arm["rate"], *spread, common, scores.clusters.df, _how(arm)]
            rows.append([base, method, other, *known])
    return pd.DataFrame(rows, columns=COLUMNS)


def _contrasts(methods: list[str]) -> list[tuple[str, str]]:
    """Each method against its base model (none), then each pair of methods."""
    return [(method, "none") for method in methods] + list(combinations(methods, 2))


def family_size(scores: Scores) -> float:
    """The mean size of a unit's family; 1 where units are by themselves."""
    sizes = np.diff(np.append(scores.clusters.starts, len(scores.strata)))
    return (sizes**2).sum() / sizes.sum()


def _arm(scores: Scores, views: list[Scores], own: pd.DataFrame) -> dict:
    """Of one method on one base model: the base's rate, the mean influence, the variance of runs
    within settings and that of a run's noise; by unit and by family.
    """
    at, setting = own["position"].to_numpy(), pd.factorize(own["setting"])[0]
    df, rate = (
        len(at) - setting.max() - 1,
        np.nan if scores.rate is None else float((scores.rate - scores.value)[at].mean()),
    )
    spread = (_rest(scores.value[at, None], setting) ** 2).sum() / df if df else np.nan
    influences = [scaled(view, scores.influence[at]) for view in views]
    noise = np.array(
        [(_rest(rows, setting) ** 2).sum() / df if df else np.nan for rows in influences]
    )
    return {
        "mean": [rows.mean(0) for rows in influences],
        "rate": rate,
        "n": len(at),
        "df": df,
        "run": spread - noise[0],
        "noise": noise,
    }


def _rest(rows: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """Rows less the mean of the rows of their setting."""
    means = np.stack([rows[setting == one].mean(0) for one in range(setting.max() + 1)])
    return rows - means[setting]


def _effect(arm: dict, other: dict | None) -> dict:
    """The mean influence of a contrast by unit, and its variance over units like these that is no
    noise of its runs; by unit and by family.
    """
    mean, noise = arm["mean"], np.nan_to_num(arm["noise"]) / arm["n"]
    if other is not None:
        mean, noise = (
            [a - b for a, b in zip(mean, other["mean"], strict=True)],
            noise + np.nan_to_num(other["noise"]) / other["n"],
        )
    return {"mean": mean[0], "variance": np.maximum([view @ view for view in mean] - noise, 0.0)}


def _between_bases(effects: list[dict]) -> float:
    """The correlation of a unit's effect on two base models, over all pairs of them; null for one
    base model, and where no effect differs over units.
    """
    pairs = list(combinations(effects, 2))
    scale = sum(np.sqrt(a["variance"][0] * b["variance"][0]) for a, b in pairs)
    return (
        float(np.clip(sum(a["mean"] @ b["mean"] for a, b in pairs) / scale, 0.0, 1.0))
        if scale > 0
        else np.nan
    )


def _spread(arm: dict, effect: dict, n_units: int, size: float) -> list[float]:
    """run, noise, df_run, unit, icc."""
    by_unit, by_family = effect["variance"]
    icc = (
        np.clip((by_family / by_unit - 1) / (size - 1), 0.0, 1.0)
        if size > 1 and by_unit > 0
        else 0.0
    )
    run = np.sqrt(max(arm["run"], 0.0)) if arm["df"] else np.nan
    return [run, np.sqrt(n_units * arm["noise"][0]), arm["df"], np.sqrt(n_units * by_unit), icc]


def _how(arm: dict) -> str:
    if arm["df"] == 0:
        return (
            "no setting was run twice: the spread of runs is not known, and what varies over"
            " prompts holds the noise of these runs"
        )
    return "components within settings, by moments" + (
        "; runs differ no more than the noise of their prompts makes them" if arm["run"] < 0 else ""
    )


def _of_class(known: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """The components by method; of one that the original study did not run those of the method of
    its class whose runs differ most, which is cautious.
    """
    alike = {
        METHOD_CLASS[method]: method for method in known.sort_values("run").index
    }  # the last of a class has the largest
    return pd.concat(
        [
            known,
            *(
                known.loc[[alike[METHOD_CLASS[method]]]].set_axis([method])
                for method in methods
                if method not in known.index
            ),
        ]
    )


def assumed(base_rates: dict[str, float], methods: list[str], icc: float = 0.0) -> pd.DataFrame:
    """The components to plan with where a study has no data yet: the original study's, at the base
    models' own unsafe-response rates (percent).

    A method that it did not run has those of the method of its class whose runs differed most. A
    difference of two methods takes both methods' effects as unrelated, which is cautious: on the
    same prompts they agree in part.

    Raises:
        ValueError: a rate that is none, or one of 0 or 100 percent; a method that the original
            study did not run.
    """
    for base, rate in base_rates.items():
        if not 0 < rate < 100:
            raise ValueError(
                f"the base rate of {base} is {rate:g} percent; at 0 or 100 percent no prompt can"
                " vary, so give a rate between them that it may well be"
            )
    if strange := [method for method in methods if method not in METHOD_CLASS]:
        raise ValueError(
            f"the original study has no spread of {strange[0]}; give components of your own, from a"
            " pilot"
        )
    rows, known = [], _of_class(ORIGINAL.set_index("method"), methods)
    df_unit = ORIGINAL_PROMPTS - ORIGINAL_CATEGORIES
    how = (
        "the original study's spread of runs (arXiv 2511.00382), and its shares of the base's own"
        " spread over prompts"
    )
    for base, rate in base_rates.items():
        scale = np.sqrt(rate * (100 - rate))
        for method, other in _contrasts(methods):
            one, noise = known.loc[method], scale * known.loc[method, "noise"]
            unit = scale * np.hypot(
                one["unit"], known.loc[other, "unit"] if other != "none" else 0.0
            )
            run = np.sqrt(max(one["run"] ** 2 - noise**2 / ORIGINAL_PROMPTS, 0.0))
            spread = [rate, run, noise, one["df_run"], unit, icc, one["between_bases"]]
            rows.append([base, method, other, *spread, df_unit, how])
    return pd.DataFrame(rows, columns=COLUMNS)


def borrowed(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The components `own`, with the spread of runs and its noise from `other` where no setting was
    run twice; `how` says so.
    """
    keys = ["base_model", "method", "other"]
    found = own[keys].merge(other, on=keys, how="left").set_index(own.index)
    lacks = own["run"].isna() & found["run"].notna()
    taken = own.copy()
    taken.loc[lacks, ["run", "noise", "df_run"]] = found.loc[lacks, ["run", "noise", "df_run"]]
    return taken.assign(
        how=own["how"].where(
            ~lacks,
            "spread over prompts of this study, which ran no setting twice; spread of runs: "
            + found["how"].fillna(""),
        )
    )
