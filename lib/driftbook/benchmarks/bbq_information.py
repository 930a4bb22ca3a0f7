"""Whether answers to BBQ hold information about its questions, against a control in which they are
shuffled among items.

BBQ draws the places of an item's options at random. A model that answers by the place therefore has
the answers of one item as likely as those of another, and shuffling changes nothing but by chance.
What shuffling takes away is information about the options: which one is UNKNOWN, which person is
the right one, which person the stereotype is about. Three contrasts, one of each (`CONTRASTS`), are
tested together.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from driftbook.benchmarks.bbq import from_logprobs
from driftbook.benchmarks.bbq_orders import OPTIONS, ORDERS, READ

CONTRASTS = ("unknown", "right person", "stereotyped person")
PERSONS = CONTRASTS[1:]
SHUFFLES, LARGE = 499, 4_000_000  # orders drawn; the most numbers of one run at a time
FOUND = ["t_all", "p_all", "p_all_adjusted", "t_persons", "p_persons", "p_persons_adjusted"]
COUNTED = ["n_items", "accuracy", "control"]


class Contrast(NamedTuple):
    """One contrast in the items that have it: which they are, how their options lie (a number per
    arrangement) and, for each run, what an arrangement would give [runs, items, arrangements].
    """

    items: np.ndarray
    arrangement: np.ndarray
    gives: np.ndarray


def held_information(
    answers: pd.DataFrame,
    items: pd.DataFrame,
    families: pd.Series | None = None,
    n_shuffles: int = SHUFFLES,
    seed: int = 0,
) -> pd.DataFrame:
    """A row per run of official answers (bbq_orders.official): n_items read, their accuracy and
    that of the shuffled control (shares), and the test of all contrasts and of those of persons:
    the largest |t|, its p value, and p adjusted within the run's family of tests.

    Arrangements are shuffled among the items of a context, which leaves every place's prior as it
    is. Each t is studentised by question families, so that the test also holds where items of a
    family share the order of their options (Chung and Romano 2013, Annals of Statistics 41, 484).
    p values are the largest |t|'s over contrasts, adjusted ones also over the runs of a family of
    tests, from the same shuffles (Westfall and Young 1993, Resampling-based multiple testing). A
    family of runs without information has an adjusted p of .05 or less in 5 % of studies at most.
    `families` names the family of each run_id; without it all runs are one. `control` is the
    accuracy expected of answers shuffled within contexts.

    Raises:
        ValueError: an answer to an item that is not among the items.
    """
    runs = pd.Index(answers.run_id.unique(), dtype=object)
    known = _items_of(answers, items)
    probabilities, read, correct = _wide(answers, runs, known)
    contrasts = _contrasts(known, probabilities)
    rng, context = np.random.default_rng(seed), pd.factorize(known.context)[0]
    family = pd.factorize(known.question_family.fillna(known.item_id))[0]
    t = np.stack([_shuffled(one, context, family, n_shuffles, rng) for one in contrasts])
    of_runs = np.zeros(len(runs), int)
    if families is not None:
        of_runs = pd.factorize(families.reindex(runs))[0]
    found = {"run_id": runs, **_counts(known, answers, runs, read, correct)}
    for name, part in (("all", t), ("persons", t[1:])):
        largest = np.abs(part).max(0)
        found[f"t_{name}"] = largest[:, 0]
        found[f"p_{name}"] = _p(largest[:, 0], largest)
        adjusted = [largest[of_runs == one].max(0) for one in range(of_runs.max() + 1)]
        found[f"p_{name}_adjusted"] = _p(largest[:, 0], np.stack(adjusted)[of_runs])
    return pd.DataFrame(found)[["run_id", *COUNTED, *FOUND]]


def averaged(answers: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """The answers of the items that were asked in all three orders, by the mean of each option's
    probability over them: answer_mode `averaged`, in which each option stood in each place once.

    The cyclic permutation of Zheng et al. (2024): the costly debiasing that PriDe's estimated prior
    stands in for, and so its check.
    """
    own = answers[answers.prompt_variant.eq("default") & answers.answer_mode.isin(READ)]
    counts = own.groupby(["run_id", "item_id"]).option_order.transform("nunique")
    own = own[counts.eq(len(ORDERS)) & own.answer.notna()]
    if own.empty:
        return own
    mean = own.groupby(["run_id", "item_id"], sort=False)[[*OPTIONS, "option_mass"]].agg(
        ["mean", "size"]
    )
    mean = mean[mean[OPTIONS[0]]["size"].eq(len(ORDERS))].xs("mean", axis=1, level=1)
    mean = mean.reset_index()
    asked = items.set_index("item_id").loc[mean.item_id].reset_index()
    found = from_logprobs(asked, np.log(np.maximum(mean[OPTIONS].to_numpy(float), 1e-300)))
    return found.assign(
        run_id=mean.run_id.to_numpy(),
        option_mass=mean.option_mass.to_numpy(float),
        answer_mode="averaged",
        prompt_variant="default",
        option_order="all",
    )


# ---- items and answers side by side
def _items_of(answers: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """The items that were asked, in one order, with their families."""
    asked = answers.item_id.unique()
    absent = sorted(set(asked) - set(items.item_id))
    if absent:
        raise ValueError(
            f"item {absent[0]} was answered and is not among the items; take both from one study"
        )
    known = items.set_index("item_id").loc[asked].reset_index()
    return known.reindex(columns=list(dict.fromkeys([*known.columns, "question_family"])))


def _wide(
    answers: pd.DataFrame, runs: pd.Index, known: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [runs, items, 3] in the file's order, and which answers were read and are
    right [runs, items].
    """
    at = runs.get_indexer(answers.run_id), pd.Index(known.item_id).get_indexer(answers.item_id)
    probabilities = np.full((len(runs), len(known), 3), np.nan)
    probabilities[at] = answers[OPTIONS].to_numpy(float)
    read, correct = (np.zeros((len(runs), len(known)), bool) for _ in range(2))
    read[at] = answers.answer.notna().to_numpy() & np.isfinite(probabilities[at]).all(1)
    correct[at] = answers.correct.astype("boolean").fillna(False).to_numpy(bool)
    return probabilities, read, correct & read


def _counts(
    known: pd.DataFrame,
    answers: pd.DataFrame,
    runs: pd.Index,
    read: np.ndarray,
    correct: np.ndarray,
) -> dict[str, np.ndarray]:
    """Items read, accuracy, and the control's: in each context the sum over places of the share of
    answers there times the share of right options there.
    """
    at = runs.get_indexer(answers.run_id), pd.Index(known.item_id).get_indexer(answers.item_id)
    chosen = np.full(read.shape, -1)
    chosen[at] = answers.answer.map({"A": 0, "B": 1, "C": 2}).fillna(-1).to_numpy(int)
    n, control = read.sum(1), np.zeros(len(runs))
    for context in known.context.unique():
        here = read & known.context.eq(context).to_numpy()
        for place in range(3):
            share = (here & (known.label.to_numpy() == place)).sum(1) / np.maximum(here.sum(1), 1)
            control += (here & (chosen == place)).sum(1) * share
    with np.errstate(invalid="ignore"):
        return {"n_items": n, "accuracy": correct.sum(1) / n, "control": control / n}


# ---- contrasts
def _contrasts(known: pd.DataFrame, probabilities: np.ndarray) -> list[Contrast]:
    """The three contrasts: the debiased probability of UNKNOWN, and of two persons how much more
    probable the right one is, and the one whom the stereotype speaks of.
    """
    logs = np.log(np.maximum(probabilities, 1e-300))
    logs = logs - logs.mean(2, keepdims=True)
    prior = np.nanmean(np.where(np.isfinite(logs), logs, np.nan), 1, keepdims=True)
    free = np.exp(logs - prior)
    # [.., i, j]: how much more probable i is than j, of the two; -1 to 1
    pairs = np.tanh((logs - prior)[..., :, None] / 2 - (logs - prior)[..., None, :] / 2)
    unknown, label = known.unknown.to_numpy(), known.label.to_numpy()
    target = known.target.astype("Float64").to_numpy(float, na_value=np.nan)
    target = np.where(np.isfinite(target), target, unknown).astype(int)
    biased = np.where(known.polarity.eq("negative"), target, 3 - unknown - target)
    everywhere, context = np.ones(len(known), bool), known.context.to_numpy()
    right = (context == "disambiguated") & (label != unknown)
    each = pairs.reshape(*pairs.shape[:2], 9)
    return [
        _centred(free / free.sum(2, keepdims=True), everywhere, unknown, context),
        _centred(each, right, 3 * label + (3 - unknown - label), context),
        _centred(each, target != unknown, 3 * biased + (3 - unknown - biased), context),
    ]


def _centred(
    gives: np.ndarray, there: np.ndarray, arrangement: np.ndarray, context: np.ndarray
) -> Contrast:
    """The contrast in the items that have it, less what each arrangement gives on average over the
    items of a context: what the places give whatever stands there. Nothing where it is not read.
    """
    items = np.flatnonzero(there)
    gives = np.where(np.isfinite(gives), gives, np.nan)[:, items]
    for one in np.unique(context[items]):
        here = context[items] == one
        known = np.isfinite(gives[:, here])
        total = np.nansum(gives[:, here], 1, keepdims=True)
        gives[:, here] -= total / np.maximum(known.sum(1, keepdims=True), 1)
    gives = np.where(np.abs(gives) > 1e-12, gives, 0.0)  # not rounding; NaN is not above
    return Contrast(items, arrangement[items], gives)


def _shuffled(
    contrast: Contrast,
    context: np.ndarray,
    family: np.ndarray,
    n_shuffles: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """t [runs, 1 + shuffles] of a contrast: first as the options lie, then shuffled."""
    items, arrangement, gives = contrast
    n = len(items)
    t = np.zeros((len(gives), 1 + n_shuffles))
    if n < 2:
        return t
    order = np.argsort(family[items], kind="stable")  # families lie together
    arrangement, gives = arrangement[order], gives[:, order]
    starts = np.flatnonzero(np.r_[True, np.diff(family[items][order]) != 0])
    drawn = np.tile(arrangement, (1 + n_shuffles, 1))
    for one in np.unique(context[items]):
        here = np.flatnonzero(context[items][order] == one)
        drawn[1:, here] = rng.permuted(drawn[1:, here], axis=1)
    step = max(LARGE // n, 1)
    for run, given in enumerate(gives):
        for at in range(0, 1 + n_shuffles, step):
            values = given[np.arange(n), drawn[at : at + step]]
            t[run, at : at + step] = _studentised(values, starts)
    return t


def _studentised(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum of values [shuffles, items] over its standard error by families, which begin at
    `starts`; 0 where nothing differs from nothing.
    """
    total, mean = values.sum(1), values.mean(1, keepdims=True)
    of_families = np.add.reduceat(values - mean, starts, axis=1)
    n = len(starts)
    error = np.sqrt(np.square(of_families).sum(1) * n / max(n - 1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(total) < 1e-12, 0.0, total / error)


def _p(value: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """The share of the draws [runs, 1 + shuffles], the observed one among them, that are at least
    as large as the value [runs].
    """
    # the observed value of a run is one of its own draws, but of a family's largest none
    at_least = (shuffled[:, 1:] >= value[:, None] * (1 - 1e-9)).sum(1)
    return (1 + at_least) / shuffled.shape[1]
