"""The primary tests of a study, found among its estimates: families declared in the study file, p
values adjusted within each.
"""

import pandas as pd

from driftbook.stats import comparisons, noninferiority, terms
from driftbook.stats.confidence import ALPHA, BELOW
from driftbook.stats.noninferiority import JOINTLY
from driftbook.stats.populations import counted
from driftbook.study.methods import METHOD_LABELS, METHODS
from driftbook.study.sections import Family
from driftbook.study.study_file import Study
from driftbook.study.tables import ESTIMATES

DECLARED = "declared family"  # group; the member is the family of tests
_OUTCOMES = {
    "unsafe": (terms.UNSAFE, "safety"),
    "not_refused": (terms.UNREFUSED, "safety"),
    "over_refusal": (terms.REFUSED, "over_refusal"),
    "refused": (terms.REFUSED, "safety"),
    "accuracy_ambiguous": (terms.ACCURACY_AMB, "bbq"),
    "accuracy_disambiguated": (terms.ACCURACY_DIS, "bbq"),
    "bias_ambiguous": (terms.BIAS_AMB, "bbq"),
    "bias_disambiguated": (terms.BIAS_DIS, "bbq"),
    "loss": (terms.LOSS, "utility"),
    "correct": (terms.CORRECT, "utility"),
}


SENSITIVITY = (
    2.0,
    3.0,
    5.0,
)  # margins in percentage points that stand beside the one fixed beforehand


def check_read(study: Study, estimates: pd.DataFrame) -> None:
    """Raise a ValueError where a notebook whose estimates the declared outcomes need has not
    run.
    """
    sources = {
        "safety": "09_safety",
        "over_refusal": "09_safety",
        "bbq": "10_fairness",
        "utility": "12_tradeoffs",
    }
    needed = {
        sources[_OUTCOMES[name][1]] for family in study.primary.values() for name in family.outcomes
    }
    if missing := sorted(needed - set(estimates["notebook"])):
        raise ValueError(
            f"no estimates of {' and '.join(missing)}; run that notebook first, or make study"
        )


def tests(study: Study, estimates: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `estimates` that the families test, with p_adjusted by Holm within each, and a
    sentence for each test that has no p value.

    A family `preserves` tests the outcomes jointly at its margin; the single outcomes, and the
    margins of SENSITIVITY, stand beside it without a family.
    """
    parts, missing = [], []
    unread = estimates[estimates["estimator"].eq(terms.UNREADABLE)]
    estimates = estimates[estimates["estimator"].eq(terms.PRIMARY)]
    for name, family in study.primary.items():
        missing += _unread(name, family, unread)
        rows = (
            _preserves(study, family, estimates)
            if family.test == "preserves"
            else _compared(study, family, estimates)
        )
        if rows.empty:
            missing.append(
                f"{name}: there is no estimate of what it tests (a base model without these runs,"
                " or an outcome that was not measured)"
            )
            continue
        primary = (
            rows["outcome"].eq(JOINTLY) & rows["margin"].eq(family.margin)
            if family.test == "preserves"
            else pd.Series(True, index=rows.index)
        )
        tested = comparisons.declared(rows[primary], name)
        missing += [
            f"{name}: {_named(row)} cannot be tested ({row.how})"
            for row in tested[tested["p"].isna()].itertuples()
        ]
        parts.append(
            ESTIMATES.concat([tested, rows[~primary]]).assign(
                group=DECLARED, member=name, notebook="19_primary"
            )
        )
    return ESTIMATES.concat(parts), missing


def _unread(name: str, family: Family, unread: pd.DataFrame) -> list[str]:
    """A sentence for each outcome of a family that is no finding on some base models."""
    found = []
    for outcome, benchmark in map(_OUTCOMES.get, family.outcomes):
        own = unread[unread["outcome"].eq(outcome) & unread["benchmark"].eq(benchmark)]
        if len(own):
            bases = ", ".join(own["base_model"].unique())
            found.append(
                f"{name}: the {outcome} is not tested on {bases}, whose answers hold no information"
                " about persons"
            )
    return found


def _named(row) -> str:
    other = "" if row.against == terms.NONE else f" to {row.against}"
    where = "" if row.base_model == "all" else f", {row.base_model}"
    return f"{METHOD_LABELS[row.method]}, {row.contrast}{other}, {row.outcome}{where}"


def _scope(study: Study, family: Family, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the family's methods and base models, by the study's first judge, in the methods'
    order.
    """
    methods = [method for method in METHODS if method in (family.methods or study.methods)]
    rows = rows[
        rows["method"].isin(methods)
        & (rows["base_model"].eq("all") == (family.bases == "all together"))
        & ~rows["judge"].isin(list(study.judges)[1:])
    ]
    return rows.iloc[rows["method"].map(methods.index).argsort(kind="stable")]


def _compared(study: Study, family: Family, estimates: pd.DataFrame) -> pd.DataFrame:
    methods = family.methods or tuple(study.methods)
    contrast = terms.CHANGE if family.test == "change" else comparisons.DIFFERENCE
    rows = estimates[estimates["group"].eq(family.group) & estimates["contrast"].eq(contrast)]
    rows = _scope(study, family, rows[rows["against"].isin([terms.NONE, *methods])])
    return pd.concat(
        [
            rows[rows["outcome"].eq(outcome) & rows["benchmark"].eq(benchmark)]
            for outcome, benchmark in map(_OUTCOMES.get, family.outcomes)
        ]
    )


def _preserves(study: Study, family: Family, estimates: pd.DataFrame) -> pd.DataFrame:
    margins = (family.margin, *(margin for margin in SENSITIVITY if margin != family.margin))
    outcomes = [_OUTCOMES[name] for name in family.outcomes]
    return _scope(
        study,
        family,
        noninferiority.preserves(_scope(study, family, estimates), margins, outcomes, family.group),
    )


def primary_sentence(tested: pd.DataFrame, deviations: list[str]) -> str:
    """How many of the declared tests told something, and what is preserved."""
    if tested.empty:
        return (
            "The study file declares no primary tests, or none could be made: whatever its"
            " notebooks find is exploratory."
        )
    families, joint = (
        tested[tested["family_of_tests"].notna() & tested["margin"].isna()],
        tested[tested["family_of_tests"].notna() & tested["margin"].notna()],
    )
    told = int(families["p_adjusted"].lt(ALPHA).sum())
    words = (
        [
            f"{told} of {len(families)} declared tests of a change or difference have an adjusted p"
            f" {BELOW}"
        ]
        if len(families)
        else []
    )
    for margin, rows in joint.groupby("margin"):
        said = rows["how"].str.partition(":")[0]
        words += [
            f"at a margin of {margin:g} points "
            + "; ".join(f"{word}: {_listed(rows[said.eq(word)])}" for word in dict.fromkeys(said))
        ]
    end = (
        "declared before any run was scored"
        if not deviations
        else (
            f"{counted(len(deviations), 'deviation')} from what was declared, so the tests that"
            f" {'it names' if len(deviations) == 1 else 'they name'} are exploratory"
        )
    )
    return "; ".join(words) + f" ({end})."


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(
        METHOD_LABELS[row.method] + ("" if row.base_model == "all" else f" on {row.base_model}")
        for row in rows.itertuples()
    )
