"""What is wrong with a study, found from its tables: labels, no-ops, seeds, rounds, echoed prompts,
base models at chance, and what its data cannot say.

An **error** makes the study's own labels or answers untrustworthy; a **warning** says what may be
read wrongly; a **note** says what the data cannot tell, or what could not be checked. Findings by
count need no test. Those by test share ALPHA: each kind of test has its part of it (SHARES), within
which p values are adjusted by Holm's method, so that a study without flaws raises a false alarm at
most 5 % of the time.
"""

import numpy as np
import pandas as pd

from driftbook.doctors import (
    study_design,
    study_letters,
    study_no_ops,
    study_rounds,
    study_settings,
)
from driftbook.doctors.findings import STUDY_COLUMNS
from driftbook.doctors.study_echoes import echoed_prompts
from driftbook.doctors.study_seeds import one_seed
from driftbook.doctors.study_tables import arranged

CHECKS = (  # each gives rows (finding_row) from the study's tables (Given)
    *(study_settings.recorded_settings, study_settings.rates_from_answers),
    study_settings.dropped_examples,
    *(study_no_ops.no_ops, study_no_ops.undone_repairs, one_seed),
    *(study_rounds.no_op_drift, study_rounds.rate_drift, echoed_prompts),
    *(study_design.repeated_rows, study_design.lost_runs, study_design.lone_settings),
    *(study_design.missing_cells, study_design.unscored_answers, study_design.extreme_rates),
    *(study_design.base_scored_once, study_letters.at_chance, study_letters.by_position),
)


def examine_study(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The findings about a study, errors first: finding, severity, where (run_ids or names),
    sentence, statistic, p, p_adjusted.

    Reads what is there of variants (needed), runs, verdicts, prompts, curves, rates, answers;
    responses together with texts (benchmark, prompt_id, prompt) for echoes; `information` (a row
    per base model, analyses.information.base_information) for answers at chance. `verdicts` may
    hold response_chars in place of n_tokens. What cannot be checked is a note that begins with "not
    checked".

    Raises:
        ValueError: there is no table `variants`, or no variant in it.
    """
    if "variants" not in tables or tables["variants"].empty:
        raise ValueError(
            "a study is checked by its variants: the table `variants` is missing or empty; run"
            " notebook 01 or make study"
        )
    given = arranged(tables)
    rows = [row for check in CHECKS for row in check(given)]
    found = pd.DataFrame(rows, columns=STUDY_COLUMNS)
    order = found["severity"].map({"error": 0, "warning": 1, "note": 2})
    return found.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def list_findings(findings: pd.DataFrame) -> str:
    """The findings as a list in markdown, a line each."""
    if findings.empty:
        return "Nothing was found.\n"
    return "".join(
        f"- **{row.severity}, {row.finding.replace('_', ' ')}**: {row.sentence}\n"
        for row in findings.itertuples()
    )


def study_alarms(findings: pd.DataFrame) -> pd.DataFrame:
    """The errors and warnings among the findings."""
    return findings[findings["severity"].ne("note")]
