"""What an audit knows beside the answers: how wrong those are who read them, and how many tokens
the adapter was trained on.
"""

import pandas as pd

from driftbook.batch import collecting
from driftbook.batch.auditing import Audit
from driftbook.benchmarks.data import training_examples
from driftbook.models.conversations import conversation_ids
from driftbook.stats.agreement import with_labels
from driftbook.study import folders
from driftbook.study.files import ROOT
from driftbook.study.sections import Source
from driftbook.study.sources import locate
from driftbook.study.tables import RESPONSES, RUNS, VERDICTS
from driftbook.training.examples import longest

DETECTOR_ERROR = ROOT / "data" / "refusal_detector.csv"  # written by python -m bench.judges
ALL = "all"  # its row of all models together


def detector_error() -> str:
    """How well the refusal detector agrees with people, in words."""
    rows = pd.read_csv(DETECTOR_ERROR)
    found = rows[rows["answers_of"].eq(ALL)].iloc[0]
    models = ", ".join(rows.loc[rows["answers_of"].ne(ALL), "answers_of"])
    answers = f"answers of {models} to prompts of XSTest that it was not made on"
    return in_words(found, "people", answers, "refusals", "answers that do not refuse")


def judge_errors(audit: Audit) -> dict[str, str | None]:
    """How well each judge agrees with the known truth of the answers that it read here, in words;
    null where no truth is known.
    """
    errors = dict.fromkeys(audit.study.judges)
    places = [place for place, (name, _) in audit.places.items() if name == "safety"]
    places = [one for one in places if VERDICTS.path(one).is_file()]
    if not places or audit.study.benchmarks["safety"].truth is None:
        return errors
    answers = RESPONSES.read_all([RESPONSES.path(one) for one in places])
    verdicts = VERDICTS.read_all([VERDICTS.path(one) for one in places])
    try:
        locate(Source(source=audit.study.benchmarks["safety"].truth), audit.study)
    except ValueError:  # its file is not here
        return errors
    truth = collecting.labels(audit.study, answers, pd.DataFrame())
    known = verdicts.merge(truth, on=["benchmark", "prompt_id", "run_id"], validate="m:1")
    for name, rows in known.groupby("judge"):
        if name in errors:
            found = with_labels(rows["unsafe"], rows["label"].eq("unsafe"))
            read = "answers of both sides whose truth is known"
            errors[name] = in_words(found, "the truth", read, "unsafe ones", "safe ones")
    return errors


def in_words(found: pd.Series, whom: str, answers: str, yes: str, no: str) -> str:
    """A row of stats.agreement.with_labels in words."""
    n = int(found["n"] - found["unscored"])
    text = f"agrees with {whom} on {100 * found['agreement']:.0f} % of {n:,} {answers}"
    if not pd.isna(found["kappa"]):
        text += f" (kappa {found['kappa']:.2f})"  # its ends take answers to one prompt as several
    rates = [(found["sensitivity"], yes), (found["specificity"], no)]
    said = [f"{100 * rate:.0f} % of the {what}" for rate, what in rates if not pd.isna(rate)]
    return f"{text}: right on {' and '.join(said)}" if said else text


def trained_tokens(audit: Audit) -> float | None:
    """The tokens that training read, repetitions and both answers of a preference counted, of an
    adapter that a study here trained; None where it is not known.
    """
    study = audit.candidate.study
    if study is None:
        return None
    variant = next(one for one in study.variants if one.run_id == audit.candidate.name)
    place = folders.folder(study, variant)
    if not variant.dataset or variant.repair or not RUNS.path(place).is_file():
        return None
    run, limit = RUNS.read(place).iloc[0], longest(audit.base, study)
    examples = training_examples(variant.dataset, study)
    try:
        sizes = [
            min(limit, sum(map(len, conversation_ids(audit.base.tokenizer, one["prompt"], text))))
            for one in examples
            for key, text in one.items()
            if key != "prompt"
        ]
    except ValueError:  # the template that was chosen cannot write them
        return None
    return float(sum(sizes) / len(examples) * run["n_examples"] * run["trained_epochs"]) or None
