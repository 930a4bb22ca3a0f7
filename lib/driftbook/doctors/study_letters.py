"""Base models at chance on BBQ, and base models that answer it by the place of an option."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from driftbook.benchmarks.bbq import places
from driftbook.benchmarks.bbq_orders import OPTIONS, ORDERS, READ, flips
from driftbook.doctors.findings import finding_row, unchecked_row
from driftbook.doctors.study_tables import Given, alpha_of
from driftbook.stats.confidence import ALPHA
from driftbook.stats.intervals import holm


def at_chance(given: Given) -> Iterator[dict]:
    """Base models whose answers to BBQ cannot be told from shuffled ones, or tell no person from
    another: a warning each. It follows from a test that did not reject at ALPHA, so that a base
    model with much information seldom has one.
    """
    known = given.table("information")  # a row per base model: information.base_information
    if known is None:
        if given.table("answers") is not None:
            why = "the answers to BBQ were not compared with shuffled ones; notebook 10 does"
            yield unchecked_row("base_at_chance", why)
        return
    for row in known[known["p_persons"].gt(ALPHA)].itertuples():
        what = "hold no information about the question"
        if row.p_all <= ALPHA:
            what = "tell UNKNOWN from persons, and no person from the other"
        text = f"""answers of {row.base_model} to {row.n_items} BBQ items {what}: accuracy
            {row.accuracy:.1f} %, {row.control:.1f} % of shuffled answers. Its bias scores and
            changes in them are no findings; ask more items, or a model that can do them."""
        p = row.p_all if row.p_all > ALPHA else row.p_persons
        yield finding_row("base_at_chance", "warning", row.base_model, text, row.accuracy, None, p)


def by_position(given: Given) -> Iterator[dict]:
    """Base models that repeat the letter more often than the option when BBQ's options are shown in
    other orders: a sign test over the items asked in all three, one-sided, by Holm's method. The
    likeliest option counts, whatever the options have together.
    """
    answers = given.table("answers")
    if answers is None:
        return
    bases = given.bases[given.bases.isin(answers["run_id"])]
    if answers["option_order"].nunique() < len(ORDERS):
        yield unchecked_row("answers_by_position", "no BBQ item was asked in other orders")
        return
    tests = [position_test(base, answers[answers["run_id"].eq(run)]) for base, run in bases.items()]
    found = pd.DataFrame([one for one in tests if one])
    if found.empty:
        return
    found["adjusted"] = holm(found["p"])
    for row in found[found["adjusted"].le(alpha_of("position"))].itertuples():
        text = f"""{row.base} answers BBQ by the position of an option: {row.changed} of {row.n}
            items asked in three orders change their answer with the order, {row.letter} of them
            repeat the letter more often than the option, and {100 * row.most:.0f} % of all answers
            are the letter {row.mode}. Read the scores without the prior of places."""
        numbers = row.changed / row.n, row.p, row.adjusted
        yield finding_row("answers_by_position", "warning", row.base, text, *numbers)


def position_test(base: str, answers: pd.DataFrame) -> dict | None:
    """The sign test of one base model, with the shares that its sentence gives; None where no item
    was read in all three orders.
    """
    official = answers["answer_mode"].isin(READ)
    asked = answers[official & answers["prompt_variant"].eq("default")]
    shown = asked[asked[OPTIONS].notna().all(axis=1)]
    if shown.empty:
        return None
    # also where the options together have too little probability to count as an answer
    likeliest = shown[OPTIONS].to_numpy(float).argmax(1)
    shown = shown.assign(answer=np.array(list("ABC"))[likeliest])
    found = flips(shown)
    wide = shown[shown["item_id"].isin(found["item_id"])].pivot(
        index="item_id", columns="option_order", values="answer"
    )
    if wide.empty:
        return None
    options = np.stack([wide[order].map("ABC".index).to_numpy(int) for order in ORDERS], 1)
    turned = [np.argsort(places(order)) for order in ORDERS]
    letters = np.stack([at[options[:, i]] for i, at in enumerate(turned)], 1)
    more = _pairs(letters) - _pairs(options)
    differ = int((more != 0).sum())
    p = binomtest(int((more > 0).sum()), differ, alternative="greater").pvalue if differ else 1.0
    at = [np.argsort(places(order)) for order in shown["option_order"]]
    given = [at_[("ABC".index(one))] for at_, one in zip(at, shown["answer"], strict=True)]
    counts = np.bincount(given, minlength=3)
    return {
        "base": base,
        "n": len(wide),
        "changed": int(found["flip"].sum()),
        "letter": int((more > 0).sum()),
        "most": counts.max() / counts.sum(),
        "mode": "ABC"[counts.argmax()],
        "p": p,
    }


def _pairs(values: np.ndarray) -> np.ndarray:
    """How many of the three pairs of orders [items, 3] agree."""
    return sum((values[:, i] == values[:, i - 1]).astype(int) for i in range(3))
