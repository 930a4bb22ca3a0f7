"""What the table of estimands says is what the estimates are: the weights by a mean of means, and
the populations as the estimates name them.
"""

import re

import numpy as np
import pandas as pd
import pytest

from driftbook.analyses import estimands, primary
from driftbook.publishing import report
from driftbook.stats import comparisons, estimation, influence, terms
from driftbook.study import study_file

NAMES = {
    "study": "made",
    "notebook": "09_safety",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "mini-guard",
}
LEVELS = {"base models": "base_model", "settings": "setting", "seeds": "run_id"}
RUNS = {"one": {"a": 3, "b": 1}, "other": {"a": 2, "b": 4}}  # repetitions by base model and setting


@pytest.fixture(scope="module")
def made():
    """Runs of LoRA and IA3 in two settings of two base models, unlike in number, and the estimates
    of their changes."""
    rows = [
        {"base_model": base, "method": method, "setting": setting, "arm": "trained"}
        for base, settings in RUNS.items()
        for method in ("lora", "ia3")
        for setting, n in settings.items()
        for _ in range(n)
    ]
    bases = [{"base_model": base, "method": "none", "setting": "", "arm": "base"} for base in RUNS]
    arms = pd.DataFrame([*bases, *rows]).assign(member=terms.ALL)
    arms["run_id"] = arms["cluster"] = [f"run {i:02d}" for i in range(len(arms))]
    arms["base_run_id"] = arms["base_model"].map(dict(zip(RUNS, arms["run_id"], strict=False)))
    units = pd.MultiIndex.from_product([["x", "y"], range(20)], names=["category", "prompt_id"])
    share = np.random.default_rng(1).random((len(arms), 1))
    drawn = np.random.default_rng(2).random((len(arms), len(units))) < share
    values = pd.DataFrame(drawn.astype(float), arms["run_id"], units)
    cells = influence.cells(arms)
    found = estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **NAMES)
    changes = comparisons.between(influence.paired(values, arms), cells, **NAMES)
    return arms, pd.concat([found, changes], ignore_index=True)


@pytest.fixture
def study():
    return study_file.load("miniature")


def test_the_weights_are_those_of_a_mean_of_means(made, study):
    arms, estimates = made
    rows = estimates[
        estimates["base_model"].eq("all")
        & estimates["group"].eq(terms.AS_CONFIGURED)
        & estimates["contrast"].eq(terms.CHANGE)
    ]
    (said,) = estimands.estimands(study, rows, made[1])["Weights"]
    nested = [LEVELS[name] for name in re.split(", | and ", said.removesuffix(" alike"))]
    runs = estimates[estimates["group"].eq(terms.RUN)].rename(columns={"member": "run_id"})
    runs = runs[["run_id", "method", "value"]].merge(arms[["run_id", "base_model", "setting"]])
    means = runs.astype({"value": float})
    for depth in range(len(nested), -1, -1):
        means = means.groupby(["method", *nested[:depth]], sort=False, as_index=False)["value"]
        means = means.mean()
    shown = rows.set_index("method")["value"].astype(float)
    assert shown.to_dict() == pytest.approx(means.set_index("method")["value"].to_dict())
    naive = runs.groupby("method")["value"].mean().astype(float)
    assert not np.allclose(shown[naive.index], naive, atol=0.1)  # the words decide


def test_a_mean_is_over_the_base_models_that_ran(made, study):
    tested, _ = primary.tests(study, made[1])
    assert len(study.bases) == 4
    said = estimands.estimands(study, tested, made[1])["Of"]
    assert set(said) == {"mean of 2 base models", "each of 2 base models"}


@pytest.mark.parametrize(
    ("population", "said"),
    [
        (terms.BOTH, ["like these", "like these", "these"]),
        (terms.THESE_PROMPTS, ["like these", "these", "these"]),
        (terms.THESE_RUNS, ["these runs", "like these", "these"]),
        (
            "a new base model like these; seeds and prompts as here",
            ["as here", "as here", "a new one like these"],
        ),
        (
            terms.BOTH.replace("prompts like", "families of prompts like") + "; " + terms.BOTH,
            ["like these", "families like these or like these", "these"],
        ),
    ],
)
def test_the_population_is_the_one_of_the_estimates(made, study, population, said):
    rows = made[1].iloc[:1].assign(population=population)
    line = estimands.estimands(study, rows, made[1]).iloc[0]
    assert line[["Seeds", "Prompts", "Base models"]].to_list() == said


def test_a_declared_test_says_how_many_share_its_level(made, study):
    tested, _ = primary.tests(study, made[1])
    lines = estimands.estimands(study, tested, made[1])
    needs = lines.set_index(lines["Number"].str.partition(":")[0])["The word needs"]
    assert needs[terms.CHANGE] == "p below 0.05 by Holm, 2 tests"  # LoRA and IA3
    assert needs[comparisons.DIFFERENCE] == "p below 0.05 by Holm, 1 test"
    assert "one-sided p below 0.025 by Holm, 4 cells" in needs.iloc[-1]  # each base model


def test_the_report_says_it_of_every_number_that_it_prints(made, study):
    shown = report.printed(made[1])
    lines = estimands.estimands(study, shown, made[1])
    assert set(shown["group"]) == {terms.TRAINED}
    assert lines["The word needs"].eq("95% interval without 0, not adjusted").all()
    assert not lines.eq("not said").any().any()
    levels = made[1].assign(contrast=terms.LEVEL, method="none", group="all", base_model="one")
    assert len(report.printed(levels.iloc[:1])) == 1


def test_no_rows_give_no_lines(study):
    empty = primary.ESTIMATES.empty()
    none = estimands.estimands(study, primary.tests(study, empty)[0], empty)
    assert none.empty
    assert list(none) == list(estimands.ATTRIBUTES)
