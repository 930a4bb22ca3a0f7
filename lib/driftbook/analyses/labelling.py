"""How wrong the judge is, and what that does to the rates: a sample drawn with known probabilities,
labels taken blind, rates corrected by them.

The sheet that people fill holds text of prompts and answers: it lies in outputs/<study>/labels,
which only its owner can read, and is never published.
"""

import csv
import hashlib
import html
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from driftbook.stats.confidence import UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.intervals import wilson
from driftbook.stats.terms import CHANGE, LEVEL, UNSAFE
from driftbook.study.files import private_folder, replacing
from driftbook.study.parts import check_name
from driftbook.study.reading import csv_frame
from driftbook.study.tables import LABELS

WORDS = {"unsafe": 1.0, "safe": 0.0, "unclear": np.nan}
SHEET, KEY = "sheet.csv", "key.csv"
ANSWER = ["run_id", "benchmark", "prompt_id"]
LEAST = 3  # answers of each stratum, where it has so many: what a variance needs, and one more
JUDGE, CORRECTED, ROGAN, TRUTH = (
    "by the judge",
    "corrected by labels (PPI++)",
    "corrected by one sensitivity and specificity (Rogan-Gladen)",
    "by labels of all answers",
)
THESE, LIKE = "these answers", "these runs, prompts like these"


# ---- the sample
def draw(answers: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """About n answers, drawn at random within strata (base model x method x judge's word): ANSWER,
    stratum, sampling_probability.

    `answers` has a row per answer: ANSWER, base_model, method, unsafe (true, false, null). Half of
    the labels are shared equally by the strata and half by their size, with LEAST in each. Every
    answer has a random number of its own that depends on the seed and its ids alone (permanent
    random numbers; Ohlsson 1995), and the smallest of a stratum are taken: a larger n keeps what a
    smaller one drew.

    Raises:
        ValueError: n is too small for the strata, or an answer stands twice.
    """
    if answers.duplicated(ANSWER).any():
        raise ValueError(
            f"{answers.duplicated(ANSWER).sum()} answers stand twice; draw from the greedy answers"
            " of one judge"
        )
    word = (
        answers["unsafe"]
        .map({True: "unsafe", False: "safe"})
        .astype(object)
        .where(answers["unsafe"].notna(), "unscored")
    )
    frame = answers.assign(
        stratum=answers["base_model"].astype(str)
        + ", "
        + answers["method"].astype(str)
        + ", "
        + word.astype(str)
    )
    size = frame.groupby("stratum")["run_id"].size()
    if n < LEAST * len(size):
        raise ValueError(
            f"n={n} labels for {len(size)} strata; at least {LEAST * len(size)} are needed, {LEAST}"
            " in each"
        )
    share = n / 2 / len(size) + n / 2 * size / size.sum()
    taken = np.minimum(size, np.maximum(LEAST, share.round())).astype(int)
    frame = frame.assign(
        rank=[_number(seed, *ids) for ids in frame[ANSWER].itertuples(index=False)]
    )
    rank = frame.groupby("stratum")["rank"].rank(method="first")
    frame["sampling_probability"] = frame["stratum"].map(taken / size).astype(float)
    return frame.loc[
        rank <= frame["stratum"].map(taken), [*ANSWER, "stratum", "sampling_probability"]
    ].reset_index(drop=True)


def _number(seed: int, *ids: str) -> float:
    """A number from 0 to 1 that these words have for good."""
    return (
        int.from_bytes(hashlib.sha256("|".join((str(seed), *map(str, ids))).encode()).digest()[:8])
        / 2**64
    )


# ---- labels by people
def write_sheet(drawn: pd.DataFrame, texts: pd.DataFrame, folder: Path, seed: int) -> Path:
    """Write the sheet (label_id, prompt, response, an empty label; in random order, blind to run,
    method, base model and judge) and its key.

    `texts` has ANSWER, prompt and response. A cell that a spreadsheet would take for a formula gets
    an apostrophe before it. Sheets that people have filled stay as they are.

    Raises:
        ValueError: an answer has no text (it was purged).
    """
    frame = drawn.merge(
        texts[[*ANSWER, "prompt", "response"]], on=ANSWER, how="left", validate="1:1"
    )
    if frame["response"].isna().any():
        raise ValueError(
            f"{frame['response'].isna().sum()} answers have no text; it was purged, or the study"
            " did not finish: run it again before drawing"
        )
    frame["label_id"] = [
        hashlib.sha256(f"{seed} {ids}".encode()).hexdigest()[:12]
        for ids in frame[ANSWER].itertuples(index=False, name=None)
    ]
    frame = frame.sort_values("label_id").assign(label="")
    private_folder(folder)
    plain = frame.assign(
        **{
            name: frame[name].map(lambda text: "'" + text if text[:1] in "=+-@\t\r" else text)
            for name in ("prompt", "response")
        }
    )
    for name, columns, rows in (
        (SHEET, ["label_id", "prompt", "response", "label"], plain),
        (KEY, ["label_id", *ANSWER, "stratum", "sampling_probability"], frame),
    ):
        with replacing(folder / name) as new:
            rows[columns].to_csv(new, index=False, quoting=csv.QUOTE_NONNUMERIC)
    return folder / SHEET


def taken(folder: Path) -> pd.DataFrame:
    """The labels of every filled sheet in the folder (RATER.csv, a copy of the sheet with its
    column label filled), as rows of LABELS; none where there is no sheet.

    Raises:
        ValueError: a sheet without the columns, with an unknown or repeated id, or with a word that
            is none of safe, unsafe, unclear.
    """
    sheets = sorted(path for path in folder.glob("*.csv") if path.name not in (SHEET, KEY))
    if not sheets:
        return LABELS.empty()
    if not (folder / KEY).is_file():
        raise ValueError(
            f"{folder} has filled sheets and no {KEY}, without which nobody knows which answers"
            " they label; put it back"
        )
    key = csv_frame(folder / KEY).assign(
        sampling_probability=lambda rows: rows["sampling_probability"].astype(float)
    )
    return LABELS.concat([_filled(path, key) for path in sheets])


def _filled(path: Path, key: pd.DataFrame) -> pd.DataFrame:
    frame = csv_frame(path)
    if missing := {"label_id", "label"} - set(frame):
        raise ValueError(
            f"{path.name} has no column {sorted(missing)[0]!r}; fill a copy of {SHEET}"
        )
    frame["label"] = frame["label"].str.strip().str.lower()
    frame = frame[frame["label"].ne("")]
    if len(strange := frame.loc[~frame["label"].isin(list(WORDS)), "label"]):
        raise ValueError(
            f"{path.name}: {len(strange)} labels are none of {', '.join(WORDS)}; the first is"
            f" {strange.iloc[0]!r}"
        )
    if len(unknown := frame.loc[~frame["label_id"].isin(key["label_id"]), "label_id"]):
        raise ValueError(
            f"{path.name}: {len(unknown)} ids are not in {KEY}, the first is {unknown.iloc[0]}; was"
            " it filled from another sheet?"
        )
    if frame["label_id"].duplicated().any():
        raise ValueError(
            f"{path.name}: {frame['label_id'].duplicated().sum()} ids stand twice; keep one of each"
        )
    return LABELS.check(
        frame.merge(key, on="label_id").assign(rater=path.stem)[list(LABELS.columns)]
    )


def ask(
    folder: Path, rater: str, show: Callable[[str], None], read: Callable[[str], str] = input
) -> int:
    """Show one unlabelled answer after the other and write each label as it is given; the number
    left. An empty answer ends it, and the next call goes on.

    `show` gets HTML with the texts escaped.

    Raises:
        ValueError: the rater's name is no name of a file of labels.
    """
    path = folder / f"{check_name(rater)}.csv"
    if path.name in (SHEET, KEY):
        raise ValueError(f"rater={rater!r} is the name of another file there; take another")
    frame = csv_frame(path if path.is_file() else folder / SHEET)
    for i in frame.index[frame["label"].eq("")]:
        prompt, answer = (html.escape(frame.at[i, name]) for name in ("prompt", "response"))
        show(f"<p><b>Prompt</b><br>{prompt}</p><p><b>Answer</b><br>{answer}</p>")
        word = ""
        while (given := read(f"{', '.join(WORDS)}, or nothing to stop: ").strip().lower()) and (
            word := given
        ) not in WORDS:
            show(f"<p>{html.escape(given)} is none of the words.</p>")
        if not given:
            break
        frame.at[i, "label"] = word
        with replacing(path) as new:
            frame.to_csv(new, index=False, quoting=csv.QUOTE_NONNUMERIC)
    return int(frame["label"].eq("").sum())


# ---- rates corrected by labels
def corrected(answers: pd.DataFrame, labels: pd.DataFrame, drawn: pd.DataFrame) -> pd.DataFrame:
    """Of each method x base model (method none: the base itself): the unsafe rate and its change,
    by the judge and corrected, in percent.

    `answers` as for `draw`, with p_unsafe; `labels` has ANSWER and label (one rater); `drawn` as
    `draw` gave it. Rows: base_model, method, contrast (level, change), estimator, population,
    value, se, df, below, above (how far below and above the value its interval ends), lambda_, n,
    n_labelled, n_unclear. The estimator is PPI++ (Angelopoulos, Duchi
    and Zrnic 2023, arXiv 2311.01453), stratified (Fisch et al. 2024): the mean of l f over all
    answers plus the mean of (y - l f) over the labelled ones, each weighed by its stratum's size; f
    is the judge's probability (the cell's mean where it gave none, which biases nothing), y the
    label, and l the number that makes the variance least, between 0 (labels alone) and 1. A label
    `unclear` leaves its answer unlabelled.
    """
    frame = answers.merge(drawn, on=ANSWER, how="left").merge(
        labels[[*ANSWER, "label"]], on=ANSWER, how="left"
    )
    frame["y"] = frame["label"].map(WORDS).astype(float)
    found = {
        key: _cell(cell)
        for key, cell in frame.groupby(["base_model", "method"], sort=False, observed=True)
    }
    rows = []
    for (base_model, method), cell in found.items():
        own = {"base_model": base_model, "method": method, **cell["counts"]}
        rows += [{**own, "contrast": LEVEL, **one} for one in _interval(cell, None)]
        base = found.get((base_model, "none"))
        if method != "none" and base is not None:
            rows += [{**own, "contrast": CHANGE, **one} for one in _interval(cell, base)]
    return pd.DataFrame(rows)


def _cell(cell: pd.DataFrame) -> dict:
    """One cell: its rate by the judge and by PPI++, each prompt's part of both [prompts], the
    variance of the sample, df, lambda and counts.
    """
    n, said = len(cell), cell["unsafe"].astype("Float64").to_numpy(float, na_value=np.nan)
    p = cell["p_unsafe"].astype(float).to_numpy()
    f = np.where(np.isnan(p), np.nanmean(p) if (~np.isnan(p)).any() else 0.5, p)
    y, drawn = cell["y"].to_numpy(), cell["sampling_probability"].notna().to_numpy()
    labelled = drawn & ~np.isnan(y)
    word = np.where(np.isnan(said), 2, said)
    size, number = (
        np.array([(mask & (word == one)).sum() for one in (0, 1, 2)], float)
        for mask in (np.ones(n, bool), labelled)
    )
    counts = {
        "n": n,
        "n_labelled": int(labelled.sum()),
        "n_unclear": int((drawn & cell["label"].eq("unclear").to_numpy()).sum()),
        "n_unscored": int(np.isnan(said).sum()),
    }
    empty = number < np.minimum(size, 2)
    scored = (~np.isnan(said)).sum()  # none: no rate, rather than one of zero
    by_judge = pd.Series(np.where(np.isnan(said), 0, said) / (scored or np.nan), cell["prompt_id"])
    found = {"judge": by_judge.groupby(level=0).sum(min_count=1), "counts": counts}
    if empty.any():  # a stratum whose labels say nothing
        return found | {"value": None, "why": "a stratum has fewer than two labels"}
    weight = np.divide(size, number, out=np.zeros(3), where=number > 0)[word.astype(int)]
    rest = 1 - np.divide(number, size, out=np.ones(3), where=size > 0)
    factor = (size / n) ** 2 / np.where(number > 0, number, 1) * rest
    spread = _spread(y, f, word, labelled)
    yy, yf, ff = factor @ spread
    tuned = float(np.clip(yf / ff, 0, 1)) if ff > 1e-12 else 1.0
    part = tuned * f + np.where(labelled, weight * (np.nan_to_num(y) - tuned * f), 0.0)
    return found | {
        "value": pd.Series(part / n, cell["prompt_id"]).groupby(level=0).sum(),
        "variance": max(yy - 2 * tuned * yf + tuned**2 * ff, 0.0),
        "ends": _ends(y, word, labelled, size / n * np.sqrt(rest), spread, tuned),
        "df": float(labelled.sum() - (number > 0).sum()),
        "lambda_": tuned,
    }


def _spread(y: np.ndarray, f: np.ndarray, word: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """[stratum, (yy, yf, ff)]: variances and covariance of label and verdict in each stratum; 0
    where fewer than two answers are labelled.
    """
    spread = np.zeros((3, 3))
    for one in range(3):
        own = labelled & (word == one)
        if own.sum() > 1:
            spread[one] = np.cov(y[own], f[own])[[0, 0, 1], [0, 1, 1]]
    return spread


def _ends(
    y: np.ndarray,
    word: np.ndarray,
    labelled: np.ndarray,
    amount: np.ndarray,
    spread: np.ndarray,
    tuned: float,
) -> tuple[float, float]:
    """How far below and above the rate its truth among these answers may lie; `amount` is each
    stratum's share of the answers, less for those that are labelled (root of the finite
    population's correction).

    A stratum in which the judge is mostly right has few labels of the rarer kind, or none: its
    variance is then zero, or a matter of chance, and its error is not symmetric. So the labels of a
    stratum have Wilson's ends, shortened as the verdicts explain them, and strata are joined by
    MOVER (Zou and Donner 2008, Statistics in Medicine 27, 1693; their section 3 has binomial shares
    with Wilson's limits).
    """
    below = above = 0.0
    for one, (yy, yf, ff) in enumerate(spread):
        own = y[labelled & (word == one)]
        if len(own) == 0 or amount[one] == 0:
            continue
        low, high = wilson(own.sum(), len(own))
        left = np.sqrt(max(yy - 2 * tuned * yf + tuned**2 * ff, 0.0) / yy) if yy > 0 else 1.0
        size = amount[one] * left
        below = np.hypot(below, size * (own.mean() - low))
        above = np.hypot(above, size * (high - own.mean()))
    return float(below), float(above)


def _interval(cell: dict, base: dict | None) -> list[dict]:
    """The rate of a cell, or its change against the base's: by the judge over prompts, corrected
    for these answers, and for prompts like these.
    """
    sides = [(cell, 1.0), *([(base, -1.0)] if base else [])]
    rows = [_over_prompts([(side["judge"], sign) for side, sign in sides], JUDGE)]
    if any(side["value"] is None for side, _ in sides):
        why = next(side["why"] for side, _ in sides if side["value"] is None)
        return [
            *rows,
            {
                "estimator": CORRECTED,
                "population": LIKE,
                "value": None,
                "how": f"not corrected: {why}",
            },
        ]
    variance, df = sum(side["variance"] for side, _ in sides), min(side["df"] for side, _ in sides)
    like = _over_prompts([(side["value"], sign) for side, sign in sides], CORRECTED) | {
        "lambda_": cell["lambda_"]
    }
    below, above = cell["ends"]
    if base:  # what makes the base's rate higher makes the change lower
        below, above = np.hypot(below, base["ends"][1]), np.hypot(above, base["ends"][0])
    low = {
        "estimator": CORRECTED,
        "population": THESE,
        "value": like["value"],
        "se": 100 * max(np.sqrt(variance), (below + above) / 2 / ndtri(UPPER)),
        "df": df,
        "below": 100 * below,
        "above": 100 * above,
        "lambda_": cell["lambda_"],
    }
    if low["se"] > like["se"]:
        like |= _ended(low["se"], like["df"])
    return [*rows, like, low]


def _over_prompts(parts: list[tuple[pd.Series, float]], estimator: str) -> dict:
    """A sum over prompts with the standard error of prompts drawn like these (their parts hold the
    labels' sampling too).
    """
    total = (
        sum(sign * part for part, sign in parts)
        if len(parts) == 1
        else parts[0][0].sub(parts[1][0], fill_value=0.0)
    )
    rest = total - total.mean()
    m = len(total)
    return {
        "estimator": estimator,
        "population": LIKE,
        "value": 100 * total.sum(skipna=False),
        **_ended(100 * np.sqrt((rest**2).sum(skipna=False) * m / max(m - 1, 1)), float(m - 1)),
    }


def _ended(se: float, df: float) -> dict[str, float]:
    """A standard error and its df, with the t interval's ends."""
    half = stdtrit(df, UPPER) * se if df > 0 else np.nan
    return {"se": se, "df": df, "below": half, "above": half}


def error_rates(answers: pd.DataFrame, labels: pd.DataFrame, drawn: pd.DataFrame) -> pd.Series:
    """The judge's sensitivity and specificity over all answers, labels weighed by 1 / probability,
    with Wilson intervals at Kish's effective number of labels.
    """
    rows = drawn.merge(labels[[*ANSWER, "label"]], on=ANSWER).merge(
        answers[[*ANSWER, "unsafe"]], on=ANSWER
    )
    rows = rows[rows["label"].ne("unclear") & rows["unsafe"].notna()]
    weight, said, true = (
        1 / rows["sampling_probability"].to_numpy(float),
        rows["unsafe"].to_numpy(bool),
        rows["label"].eq("unsafe").to_numpy(),
    )
    found = {}
    for name, of, hit in (("sensitivity", true, said), ("specificity", ~true, ~said)):
        own = weight[of]
        n = own.sum() ** 2 / (own**2).sum() if of.any() else 0.0
        share = own @ hit[of] / own.sum() if of.any() else np.nan
        low, high = wilson(np.nan_to_num(share) * n, n)
        found |= {
            name: share,
            f"{name}_low": float(low),
            f"{name}_high": float(high),
            f"{name}_n": n,
        }
    return pd.Series(found)


def rogan_gladen(rate: float, rate_se: float, errors: pd.Series) -> dict:
    """The rate (percent) of a judge with one sensitivity and specificity, corrected (Rogan and
    Gladen 1978, Am. J. Epidemiol. 107, 71), delta-method error.

    Null with its reason where sensitivity + specificity is not above 1. A value outside 0 to 100 is
    kept and said: the error rates are not those of this cell.
    """
    youden = errors["sensitivity"] + errors["specificity"] - 1
    if not youden > 0:
        return {
            "value": None,
            "se": None,
            "how": (
                "not corrected: sensitivity + specificity is not above 1, the judge tells nothing"
            ),
        }
    value = (rate / 100 + errors["specificity"] - 1) / youden
    spread = {
        name: errors[name] * (1 - errors[name]) / max(errors[f"{name}_n"], 1)
        for name in ("sensitivity", "specificity")
    }
    variance = (
        (rate_se / 100) ** 2
        + value**2 * spread["sensitivity"]
        + (1 - value) ** 2 * spread["specificity"]
    ) / youden**2
    how = "one sensitivity and specificity for all cells" + (
        "" if 0 <= value <= 1 else "; outside of 0 to 100: these are not the cell's error rates"
    )
    return {"value": 100 * value, "se": 100 * np.sqrt(variance), "how": how}


def estimates(
    found: pd.DataFrame, errors: pd.Series, truth: pd.DataFrame | None = None, **names: str
) -> pd.DataFrame:
    """The result of `corrected` as rows of `estimates`, with Rogan and Gladen's correction of the
    levels, and the truth (base_model, method, value) where all is known.
    """
    rows = found.assign(how=found.get("how", pd.Series(index=found.index, dtype=object)))
    judge = rows[rows["estimator"].eq(JUDGE) & rows["contrast"].eq(LEVEL)]
    kept = ["base_model", "method", "n", "n_unscored"]
    simple = pd.DataFrame(
        [
            rogan_gladen(one["value"], one["se"], errors) | dict(one[kept])
            for _, one in judge.iterrows()
        ]
    )
    half = ndtri(UPPER) * simple["se"].astype(float)
    own = {"contrast": LEVEL, "estimator": ROGAN, "population": LIKE}
    rows = pd.concat([rows, simple.assign(**own, below=half, above=half)], ignore_index=True)
    value, below, above = (rows[name].astype(float) for name in ("value", "below", "above"))
    low, high = value - below, value + above
    level = rows["contrast"].eq(LEVEL)
    rows = rows.assign(
        ci_low=low.mask(level, low.clip(lower=0)), ci_high=high.mask(level, high.clip(upper=100))
    )
    tuned, labels = rows["lambda_"].map("{:.2f}".format), rows["n_labelled"].map("{:.0f}".format)
    corrected = "PPI++ within base model x method, lambda " + tuned + ", " + labels + " labels"
    rows["how"] = rows["how"].fillna("judge's verdicts, errors over prompts")
    rows["how"] = rows["how"].mask(
        rows["estimator"].eq(CORRECTED) & rows["value"].notna(), corrected
    )
    rows["estimator"] += np.where(rows["population"].eq(THESE), ", these answers", "")
    if truth is not None:
        rows = pd.concat(
            [rows, truth.assign(estimator=TRUTH, population=THESE, how="every answer is labelled")],
            ignore_index=True,
        )
    return complete(
        rows.rename(columns={"n": "n_items"}).assign(outcome=UNSAFE, group="as configured", **names)
    )


def bounds(answers: pd.DataFrame) -> pd.DataFrame:
    """The lowest and highest unsafe rate of each base model x method with all prompts asked as
    denominator and the unscored at either extreme, in percent.
    """
    unsafe = answers["unsafe"].astype("boolean")
    frame = answers.assign(
        low=unsafe.fillna(False).astype(float),
        high=unsafe.fillna(True).astype(float),
        unscored=unsafe.isna().astype(float),
    )
    return (
        100
        * frame.groupby(["base_model", "method"], sort=False, observed=True)[
            ["low", "high", "unscored"]
        ].mean()
    )


def truths(answers: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """The unsafe rate of each base model x method, and its change, by labels of all answers, in
    percent: base_model, method, contrast, value, n.
    """
    frame = answers.merge(labels[[*ANSWER, "label"]], on=ANSWER).assign(
        y=lambda rows: rows["label"].map(WORDS).astype(float)
    )
    level = (
        frame.groupby(["base_model", "method"], sort=False, observed=True)["y"]
        .agg(value="mean", n="size")
        .reset_index()
        .assign(contrast=LEVEL)
    )
    level["value"] *= 100
    base = level[level["method"].eq("none")].set_index("base_model")["value"]
    own = level[level["method"].ne("none")]
    of_base = own["base_model"].map(base.to_dict()).astype(float)
    change = own.assign(contrast=CHANGE, value=own["value"] - of_base)
    return pd.concat([level, change.dropna(subset="value")], ignore_index=True)


def labels_sentence(found: pd.DataFrame, errors: pd.Series) -> str:
    """The judge's error rates, how far the correction moves the changes, and how far from the truth
    it ends where that is known.
    """
    if found.empty:
        return "No answer is labelled, so nothing is known of how wrong the judge is."
    wide = (
        found[found["contrast"].eq(CHANGE)]
        .pivot_table(
            index=["base_model", "method"], columns="estimator", values="value", aggfunc="first"
        )
        .astype(float)
    )
    judge, labels, truth = (
        wide.get(name, pd.Series(np.nan, index=wide.index)) for name in (JUDGE, CORRECTED, TRUTH)
    )
    text = f"Sensitivity {errors['sensitivity']:.3f}, specificity {errors['specificity']:.3f}"
    if (labels - judge).notna().any():
        text += (
            f"; the labels move the changes by at most {(labels - judge).abs().max():.1f} points"
        )
    if (labels - judge - truth).notna().any():
        text += (
            f"; from the truth the judge's changes are {(judge - truth).abs().mean():.2f} points on"
            f" the average, the corrected ones {(labels - truth).abs().mean():.2f}"
        )
    return text + "."
