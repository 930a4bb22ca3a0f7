"""Whether a model answers by the letter: BBQ's options shown in other orders, the prior of each
place, and what is left without it.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from driftbook.benchmarks.bbq import (
    MIN_MASS,
    TEMPLATES,
    answers,
    from_logprobs,
    generated,
    places,
    with_floor,
)
from driftbook.benchmarks.format import lacking
from driftbook.stats.influence import Scores, ratio
from driftbook.study.sections import Benchmark

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

ORDERS = ("ABC", "BCA", "CAB")  # the file's, and what turns each option through the three places
OPTIONS = ["p_a", "p_b", "p_c"]
READ = ("letters", "options")  # modes of answers that are read from probabilities


def study_answers(
    items: pd.DataFrame,
    scorer: "Scorer",
    mode: str,
    run_id: str,
    benchmark: Benchmark,
    seed: int,
    system_prompt: str | None = None,
) -> pd.DataFrame:
    """Everything that a study asks a model of BBQ, as one table `answers`: each item in the file's
    order; the study's sample of `permuted` items in the two other orders, and all items once more
    without the prior of each place that these show; `generated` items answered in text; and the
    study's other wordings. Of a model that gives no probabilities (an endpoint), all of it is read
    in text, and nothing is said of priors.
    """
    wording = {
        "template": benchmark.template or TEMPLATES[mode],
        "stem": benchmark.stem,
        "system_prompt": system_prompt,
    }
    floor = MIN_MASS[mode] if benchmark.min_mass is None else benchmark.min_mass
    in_text = lacking(scorer, "letters") is not None
    # one order for all variants, whose first items are the samples
    drawn = np.random.default_rng(seed).permutation(len(items))

    def first(n: int) -> pd.DataFrame:
        return items.iloc[np.sort(drawn[:n])].reset_index(drop=True)

    parts = [answers(items, scorer, mode, run_id, min_mass=floor, **wording)]
    if benchmark.permuted:
        chosen, asking = first(benchmark.permuted), (scorer, mode, run_id)
        how = {"min_mass": floor, **wording}
        permuted = [answers(chosen, *asking, order=order, **how) for order in ORDERS[1:]]
        asked = pd.concat([parts[0][parts[0].item_id.isin(chosen.item_id)], *permuted])
        parts += permuted
        if not in_text:
            parts.append(without_prior(parts[0], items, prior(asked)))
    if benchmark.generated and not in_text:
        chosen, n_tokens = first(benchmark.generated), benchmark.max_new_tokens
        parts.append(generated(chosen, scorer, run_id, max_new_tokens=n_tokens, **wording))
    for name, other in benchmark.wordings.items():
        chosen = items if other.n is None else first(other.n)
        own = {"template": other.template, "system_prompt": other.system_prompt}
        changed = wording | {key: value for key, value in own.items() if value}
        asked = answers(chosen, scorer, mode, run_id, min_mass=floor, **changed)
        parts.append(asked.assign(prompt_variant=name))
    return with_floor(pd.concat(parts, ignore_index=True), floor)


def official(answers: pd.DataFrame) -> pd.DataFrame:
    """The rows by which a study is scored: the study's own wording, options in the file's order,
    read from probabilities; of a run that has none of these, read in text.
    """
    own = answers[answers.option_order.eq("ABC") & answers.prompt_variant.eq("default")]
    read = own.answer_mode.isin(READ)
    in_text = own.answer_mode.eq("generated") & ~own.run_id.isin(own.run_id[read])
    return own[read | in_text].reset_index(drop=True)


def prior(answers: pd.DataFrame) -> np.ndarray:
    """The probability [3] that a model gives each place whatever stands there, from items asked in
    all three orders.

    PriDe (Zheng et al. 2024, Large language models are not robust multiple choice selectors, eq.
    7): the softmax, for each item, of the log-probability of a place averaged over the orders, and
    of these the mean over items.
    """
    sorted_by_item, shown = answers.sort_values("item_id"), []
    for order in ORDERS:
        rows = sorted_by_item[sorted_by_item.option_order == order]
        shown.append(rows[OPTIONS].to_numpy(float)[:, places(order)])
    logs = np.log(np.maximum(shown, 1e-300)).mean(0)
    each = np.exp(logs - np.logaddexp.reduce(logs, 1)[:, None])
    return each[np.isfinite(each).all(1)].mean(0)


def without_prior(answers: pd.DataFrame, items: pd.DataFrame, of_place: np.ndarray) -> pd.DataFrame:
    """Answers in the file's order, each option's probability divided by the prior [3] of its place:
    answer_mode `debiased`.

    PriDe's eq. 8. `items` are those of the answers, in the same order.
    """
    logprobs = np.log(np.maximum(answers[OPTIONS].to_numpy(float), 1e-300)) - np.log(of_place)
    frame = from_logprobs(items, logprobs).assign(option_mass=answers.option_mass.to_numpy())
    return frame.assign(
        run_id=answers.run_id.to_numpy(),
        answer_mode="debiased",
        prompt_variant="default",
        option_order="ABC",
    )


def flips(answers: pd.DataFrame) -> pd.DataFrame:
    """A row per run and item that was asked in all three orders: run_id, item_id, dimension, unit
    (its question family, else the item), and flip, whether the answer was not the same each time;
    null where it could not be read in one of the orders."""
    read = answers.answer_mode.isin(READ)
    own = answers[read & answers.prompt_variant.eq("default")]
    grouped = own.groupby(["run_id", "item_id"], sort=False)
    found = grouped.agg(
        dimension=("dimension", "first"),
        unit=("question_family", "first"),
        orders=("option_order", "nunique"),
    ).reset_index()
    given = grouped.answer.agg(["nunique", "count", "size"]).to_numpy(float)
    found["flip"] = np.where(given[:, 1] == given[:, 2], given[:, 0] > 1, np.nan)
    found["unit"] = found.unit.astype(object).where(found.unit.notna(), found.item_id)
    return found[found.orders == len(ORDERS)].drop(columns="orders").reset_index(drop=True)


def flip_rate(answers: pd.DataFrame) -> Scores | None:
    """The share of each run's items whose answer changes with the order of the options, in percent;
    None where nothing was permuted.
    """
    found = flips(answers)
    if found.empty:
        return None
    counted = found.assign(read=found.flip.notna().astype(float), asked=1.0)
    values, columns = ["flip", "read", "asked"], ["dimension", "unit"]
    table = counted.pivot_table(values, "run_id", columns, aggfunc="sum").fillna(0)
    flipped, read, asked = (table[name].to_numpy(float) for name in values)
    n_asked, n_read = asked.sum(1).astype(int), read.sum(1).astype(int)
    strata = table["flip"].columns.get_level_values(0)
    return ratio(flipped, read, table.index, strata, n_asked, n_asked - n_read)


def by_letter(answers: pd.DataFrame) -> pd.DataFrame:
    """How each run answers by the letter, a row per run: option_mass, the mean probability of the
    three options together; n_permuted items asked in all three orders and flip_rate; place_1 to
    place_3, the prior of each place; n_generated items answered in text, how many are unread, and
    agreement, the share of the read ones that are the most probable option."""
    runs = answers.groupby("run_id", sort=False)
    return pd.DataFrame([{"run_id": run_id, **_of_run(rows)} for run_id, rows in runs])


def _of_run(rows: pd.DataFrame) -> dict[str, float]:
    rows = rows[rows.prompt_variant == "default"]
    own, flipped = official(rows), flips(rows)
    found: dict[str, float] = {
        "option_mass": own.option_mass.mean(),
        "n_permuted": int(flipped.flip.notna().sum()),
        "flip_rate": flipped.flip.mean(),
    }
    if flipped.flip.notna().any():
        permuted = rows[rows.answer_mode.isin(own.answer_mode) & rows.item_id.isin(flipped.item_id)]
        found |= {f"place_{i}": share for i, share in enumerate(prior(permuted), 1)}
    written = rows[rows.answer_mode == "generated"].merge(
        own[["item_id", "answer"]], on="item_id", suffixes=("", "_own")
    )
    read = written.dropna(subset=["answer", "answer_own"])
    return found | {
        "n_generated": len(written),
        "unread": int(written.answer.isna().sum()),
        "agreement": (read.answer == read.answer_own).mean(),
    }
