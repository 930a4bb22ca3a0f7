"""Settings and rates: labels that the trainer's record, a curve or the answers contradict."""

from collections.abc import Iterator

import numpy as np

from driftbook.doctors.findings import finding_row, some_of, unchecked_row
from driftbook.doctors.study_answers import label_agreement
from driftbook.doctors.study_tables import Given, alpha_of, numbers_of
from driftbook.stats.intervals import holm

DROPPED = 0.05  # share of its examples that a run may lose before it is a warning
TELLING = 2.0  # standard errors by which a run must agree with its own label
TELLING_SHARE = 0.6  # of a method's runs; one wrong run in six, with two peers, leaves half or more


def recorded_settings(given: Given) -> Iterator[dict]:
    """Labels that the trainer's record contradicts: learning rate, epochs, seed."""
    ran = given.ran
    for label in ("learning_rate", "epochs", "seed"):
        done = numbers_of(ran, f"trained_{label}")
        finding = "mislabelled_rate" if label == "learning_rate" else f"mislabelled_{label}"
        if label not in ran or done.isna().all():
            if label == "learning_rate" and len(given.trained):
                why = "no learning rate was read back from a trainer (runs.trained_learning_rate)"
                yield unchecked_row(finding, why)
            continue
        asked = numbers_of(ran, label)
        wrong = (done - asked).abs() > 1e-3 * asked.abs()
        if wrong.any():
            runs, n = ran.loc[wrong, "run_id"], done.notna().sum()
            text = f"""runs trained at another {label.replace("_", " ")} than their label says:
                {some_of(runs, n)}; the first is labelled {asked[wrong].iloc[0]:g} and was trained
                at {done[wrong].iloc[0]:g}. Take the trainer's record as the label and fit again."""
            yield finding_row(finding, "error", runs, text)
    yield from _logged_rates(given)


def dropped_examples(given: Given) -> Iterator[dict]:
    """Runs that trained on fewer examples than their label says: a note, and a warning where a run
    lost more than DROPPED of them.
    """
    ran = given.ran
    asked, used = numbers_of(ran, "n_train"), numbers_of(ran, "n_examples")
    lost = ran.assign(asked=asked, used=used, share=1 - used / asked)[used < asked]
    if lost.empty:
        return
    worst = lost.loc[lost["share"].idxmax()]
    text = f"""runs trained on fewer examples than the study asked for:
        {some_of(lost["run_id"], int(asked.notna().sum()))}; at worst on {worst["used"]:.0f} of
        {worst["asked"]:.0f}. The others did not fit training.max_length or could teach nothing
        (notebook 02 says which); raise max_length or say the number really used."""
    severity = "warning" if lost["share"].max() > DROPPED else "note"
    yield finding_row("dropped_examples", severity, lost["run_id"], text, worst["share"])


def _logged_rates(given: Given) -> Iterator[dict]:
    """Runs without a record whose curve logs rates above their label, or below half of it."""
    ran, curves = given.ran, given.table("curves")
    if curves is None or "learning_rate" not in ran:
        return
    silent = ran[numbers_of(ran, "trained_learning_rate").isna()]
    peak = curves[curves["split"].eq("train")].groupby("run_id")["learning_rate"].max()
    logged = silent["run_id"].map(peak).astype("Float64").to_numpy(float, na_value=np.nan)
    ratio = logged / silent["learning_rate"].to_numpy(float)
    wrong = silent[(ratio > 1.01) | (ratio < 0.5)]
    if len(wrong):
        first = wrong.iloc[0]
        text = f"""training curves with rates that their label does not allow:
            {some_of(wrong.run_id)}; at most {float(peak[first["run_id"]]):g} under the label
            {first["learning_rate"]:g} in the first. Find the trainer's arguments."""
        yield finding_row("mislabelled_rate", "error", wrong["run_id"], text)


def rates_from_answers(given: Given) -> Iterator[dict]:
    """Runs whose answers are those of another rate than their label's.

    Tested where a method's answers tell the rate: at least three of its runs in five must agree
    with their own label's repetitions more than with the other label's runs, by 2 standard errors.
    A soft prompt's do not where its seed matters more than its rate.
    """
    finding, found = "mislabelled_rate_by_answers", label_agreement(given.ran, given.answers)
    tested = found[found["p"].notna()]
    if tested.empty:
        why = "no setting has answers at two learning rates and in two repetitions of one of them"
        yield unchecked_row(finding, why)
        return
    tells = tested["t_own"].gt(TELLING).groupby(tested["method"]).agg(["mean", "size"])
    telling = tells.index[tells["mean"].ge(TELLING_SHARE) & tells["size"].ge(4)]
    for method, row in tells.drop(telling).iterrows():
        why = f"""answers of {method} do not tell the rate: {100 * row["mean"]:.0f} % of
            {row["size"]:.0f} runs agree more with their own label than with another, beyond chance;
            what a mislabelled run would look like, these runs look like anyway"""
        yield unchecked_row(finding, why)
    tested = tested[tested["method"].isin(telling)]
    tested = tested.assign(adjusted=holm(tested["p"]) if len(tested) else [])
    for row in tested[tested["adjusted"].le(alpha_of("mislabelled_rate"))].itertuples():
        text = f"""{row.run_id} answers as runs at {row.other_rate:g} do, not as its label
            {row.learning_rate:g}: {100 * row.other_same_length:.1f} % of its answers have exactly
            the length of theirs, against {100 * row.own_same_length:.1f} % with its own label and
            {100 * row.peers_same_length:.1f} % between the two labels. Look for the trainer's own
            record before any contrast of rates is read."""
        yield finding_row(
            "mislabelled_rate", "warning", row.run_id, text, row.t, row.p, row.adjusted
        )
    lone = found.loc[found["p"].isna(), "run_id"]
    if len(lone):
        why = f"runs without another run of their own label to agree with: {some_of(lone)}"
        yield unchecked_row(finding, why) | {"where": ", ".join(lone)}
