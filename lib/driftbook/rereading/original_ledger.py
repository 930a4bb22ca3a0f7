"""The ledger of the original study's claims, to read and to draw: tables, estimates, a sentence."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from driftbook.rereading import original_analysis, original_claims, original_study
from driftbook.rereading.original_claims import ALL_RUNS, Claim
from driftbook.rereading.original_quantifiers import (
    CLAIM_VERDICTS,
    DEPENDS,
    EVERY,
    FALLS,
    MEAN,
    OPEN,
    REPEATS,
    SHARE,
    STANDS,
    TOTAL,
    Quantified,
)
from driftbook.rereading.original_spreads import SPREAD_RATIO
from driftbook.stats import estimation
from driftbook.stats.confidence import CONFIDENCE

CLAIM, CELL = "claim", "cell of a claim"  # groups of `estimates`
CLAIMS_NOTEBOOK = "24_original_claims"
# a claim about spread has its two ratios where others have the mean and every cell
PLACES = {MEAN: MEAN, TOTAL: MEAN, EVERY: EVERY, REPEATS: EVERY, SHARE: SHARE}
RULE = "; rule: the verdict on which all three readings agree, else it depends on the reading"


@dataclass(frozen=True)
class Ledger:
    """The claims of data/original_study/claims.csv, judged, by their short names."""

    claims: dict[str, Claim]

    def table(self) -> pd.DataFrame:
        """A row per claim: its sentence, the verdict, each reading's own verdict and number, what
        the cells are, and where the claim was stated.
        """
        known = original_study.cited("claims").set_index("claim")
        rows = []
        for name, one in self.claims.items():
            read = {PLACES[reading.quantifier]: told(reading) for reading in one.readings}
            given = known.loc[name]
            about = {"cells": one.about, "stated in": given["stated_in"]}
            rows.append({"claim": given["sentence"], "verdict": one.verdict} | read | about)
        columns = ["claim", "verdict", MEAN, EVERY, SHARE, "cells", "stated in"]
        return pd.DataFrame(rows).reindex(columns=columns).fillna("no public data")

    def forms(self) -> pd.DataFrame:
        """Each claim's forms in which a reading has another verdict than with all runs; a reading
        whose verdict stays is empty. None of them decides.
        """
        known = original_study.cited("claims").set_index("claim")["sentence"]
        rows = []
        for name, one in self.claims.items():
            usual = {reading.quantifier: reading.verdict for reading in one.readings}
            for form in [form for form in original_claims.FORMS if form in one.forms]:
                other = {
                    PLACES[reading.quantifier]: told(reading)
                    for reading in one.forms[form]
                    if reading.verdict != usual[reading.quantifier]
                }
                rows += [{"claim": known[name], "form": form} | other] if other else []
        return pd.DataFrame(rows, columns=["claim", "form", MEAN, EVERY, SHARE]).fillna("")

    def estimates(self) -> pd.DataFrame:
        """The ledger as rows of `estimates`, three kinds.

        A claim (group `claim`): member is the claim, contrast its verdict, the number that of its
        first reading. A reading (group: its form): estimator is the reading, contrast its verdict.
        A cell (group `cell of a claim`): against is the cell, the interval its own.
        """
        rows = [row for name, one in self.claims.items() for row in _rows(name, one)]
        labels = original_analysis.LABELS | {"notebook": CLAIMS_NOTEBOOK}
        return estimation.complete(
            pd.DataFrame(rows).assign(**labels, base_model="all", method="all")
        )

    def sentence(self) -> str:
        """How many claims have which verdict, and how many by each reading alone."""
        found = counts(self.estimates())
        silent = sum(not one.forms for one in self.claims.values())
        by_reading = []
        for place, words in ((MEAN, "on the mean"), (EVERY, "in every cell"), (SHARE, "in most")):
            own = [
                reading.verdict
                for one in self.claims.values()
                for reading in one.readings
                if PLACES[reading.quantifier] == place
            ]
            by_reading.append(f"{words} {own.count(STANDS)} stand and {own.count(FALLS)} fall")
        return (
            f"Of {len(self.claims)} claims {found[STANDS]} stand and {found[FALLS]} fall in all"
            f" three readings, {found[DEPENDS]} depend on the reading, and {found[OPEN]} cannot be"
            f" told ({silent} of them for want of public data): {', '.join(by_reading)} (for the"
            " two claims about spread: over all runs, between equal runs, in most cells)."
        )


def judge_claims(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> Ledger:
    """The ledger of a study read again; `rows` is that of read_original. `n_boot` and `seed` are of
    the bootstrap of standard deviations.
    """
    return Ledger(original_claims.ledger(rows, n_boot, seed))


def told(reading: Quantified) -> str:
    """A reading in words: its verdict, and its number with the interval."""
    low, high, value = reading.ci_low, reading.ci_high, reading.value
    if reading.quantifier == EVERY:
        n = reading.outcome.partition("(of ")[2].rstrip(")")
        number = f"{value:.0f} of {n} cells outside ({low:.0f} to {high:.0f})"
    elif reading.quantifier == SHARE:
        number = f"{value:.0f} % of cells ({low:.0f} to {high:.0f})"
    elif reading.outcome == SPREAD_RATIO:
        number = f"{reading.quantifier} {value:.2f} ({low:.2f} to {high:.2f})"
    else:
        number = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    less = f" ({reading.known}, base scores known)" if reading.known != reading.verdict else ""
    return f"{reading.verdict}{less}: {number}"


def _rows(name: str, claim: Claim) -> list[dict]:
    """The rows of `estimates` of one claim."""
    common = {"member": name, "population": claim.population, "margin": claim.margin}
    whole = {"group": CLAIM, "contrast": claim.verdict, "outcome": claim.outcome}
    rows = [common | whole | {"how": claim.about + (RULE if claim.forms else "")}]
    if claim.forms:
        rows[0] |= _numbers(claim.readings[0])
    for form in claim.forms:
        for one in claim.forms[form]:
            named = {"group": form, "estimator": one.quantifier, "contrast": one.verdict}
            how = one.words or "see the rule"
            rows.append(common | named | {"outcome": one.outcome, "how": how} | _numbers(one))
    if claim.cells is not None:
        low, high = claim.cells.ends(CONFIDENCE, False)
        for i, cell in enumerate(claim.cells.names):
            named = {"group": CELL, "against": cell, "contrast": CELL, "outcome": claim.outcome}
            ends = {"ci_low": low[i], "ci_high": high[i], "how": claim.about}
            rows.append(common | named | {"value": claim.cells.value[i]} | ends)
    return rows


def _numbers(one: Quantified) -> dict:
    return {"value": one.value, "ci_low": one.ci_low, "ci_high": one.ci_high, "n_runs": one.n_runs}


def counts(estimates: pd.DataFrame) -> dict[str, int]:
    """How many claims of a ledger (rows of `estimates`) have each verdict."""
    verdicts = estimates.loc[estimates["group"].eq(CLAIM), "contrast"]
    return {name: int(np.sum(verdicts.eq(name))) for name in CLAIM_VERDICTS}


def deciding(estimates: pd.DataFrame) -> pd.DataFrame:
    """The readings that decide, of rows of `estimates`: estimator is the reading."""
    is_reading = estimates["estimator"].isin(list(PLACES))
    return estimates[is_reading & estimates["group"].eq(ALL_RUNS)]
