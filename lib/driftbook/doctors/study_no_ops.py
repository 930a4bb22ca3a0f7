"""Trained runs that are the base model, by record, dose or answers; repairs that undo all."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from driftbook.doctors.findings import finding_row, named, some_of, unchecked_row
from driftbook.doctors.study_answers import equal_share
from driftbook.doctors.study_tables import Given, is_no_op, numbers_of

# Mean KL per token, in nats, below which training is called a no-op: over an answer of 100 tokens
# the two models' log-likelihoods then differ by less than 0.01 nats in the mean, which no sample of
# answers of a feasible size can tell apart.
NO_OP_KL = 1e-4
NO_OP_DOSE = 1e-3  # of the base model's own loss, where no KL was recorded
NEARLY_ALL = 0.97  # of the prompts answered as the base model answers them


def no_ops(given: Given) -> Iterator[dict]:
    """Trained runs that are the base model: by record, by a dose near zero, or by their answers."""
    trained = given.ran[numbers_of(given.ran, "learning_rate").notna()]
    recorded = is_no_op(trained)
    still = numbers_of(trained, "no_op").isna() & _has_no_dose(trained)
    for runs, how in (
        (trained[recorded], "recorded as no-ops"),
        (trained[still], "with a dose near zero and no word on being a no-op"),
    ):
        if len(runs):
            text = f"""trained runs {how}: {some_of(runs["run_id"], len(trained))}. Training
                left the base model as it was: show every contrast with and without them, or raise
                their learning rate."""
            yield finding_row("no_op", "warning", runs["run_id"], text)
    yield from _answers_as_base(given, trained[~recorded & ~still], trained[recorded])


def _has_no_dose(trained: pd.DataFrame) -> pd.Series:
    """Which runs have a KL to their init (else to the base) or, without one, a dose near zero."""
    kl = numbers_of(trained, "kl_init").fillna(numbers_of(trained, "kl_base"))
    dose, loss = numbers_of(trained, "dose_nll"), numbers_of(trained, "nll_base")
    return (kl < NO_OP_KL) | kl.isna() & (dose.abs() < NO_OP_DOSE * loss)


def _answers_as_base(given: Given, trained: pd.DataFrame, recorded: pd.DataFrame) -> Iterator[dict]:
    """Runs that answer as the base model (or a known no-op) does, as often as these agree."""
    of, finding = given.answers, "no_op_by_answers"
    known = pd.concat([given.ran[given.ran["method"].eq("none")], recorded])
    if "length" not in of or given.answered(known).empty:
        why = "neither a base model nor a known no-op has answers to compare with"
        yield unchecked_row(finding, why)
        return
    if of["length"].nunique().max() < 2:
        yield unchecked_row(finding, "answers to a prompt are all of one length")
        return
    known = given.answered(known)
    for base_model, runs in given.answered(trained).groupby("base_model", sort=False):
        standard = known.loc[known["base_model"].eq(base_model), "run_id"].tolist()
        if not standard:
            continue
        among = [equal_share(of, standard[:i], [one] * i) for i, one in enumerate(standard)]
        among = np.concatenate(among)
        usual = np.quantile(among, 0.75) if len(among) else 0.0
        bound = min(NEARLY_ALL, usual) if usual > 0.5 else NEARLY_ALL
        own, n = runs["run_id"].tolist(), len(runs)
        share = np.mean([equal_share(of, own, [one] * n) for one in standard], axis=0)
        same = runs[share >= bound]
        if len(same):
            text = f"""trained runs of {base_model} that answer as the untrained model does:
                {some_of(same["run_id"], n)}, on {100 * share[share >= bound].min():.1f} % of the
                prompts or more (bound {100 * bound:.1f} %). In effect they are no-ops: look at
                their dose."""
            yield finding_row("no_op", "warning", same["run_id"], text)


def undone_repairs(given: Given) -> Iterator[dict]:
    """Repairs that took away all of the fine-tuning."""
    runs = given.planned[given.planned["made_in"].eq("mitigate") & given.planned["status"].eq("ok")]
    whole = runs[is_no_op(runs)]
    if len(whole):
        counts = [f"{name}: {n}" for name, n in whole["mitigation"].value_counts().items()]
        text = f"""repaired runs that are the base model again, nothing of the fine-tuning
            being left: {len(whole)} of {len(runs)} ({named(counts, 6)}). They answer as safely as
            it does, and have lost what was gained."""
        yield finding_row("undone", "note", whole["run_id"], text)
