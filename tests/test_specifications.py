"""The specification curve against the same numbers made another way: notebook 09's own estimates
and bounds, and plain means of a hand-made grid.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from driftbook.analyses import outcomes, specifications
from driftbook.figures import gallery
from driftbook.stats import estimation, influence, terms
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.study import opening, study_file
from driftbook.study.tables import ESTIMATES, SPECIFICATIONS, greedy
from simulated import simulate

FIELDS = list(specifications.Choice._fields)
NAMES = {"study": "s", "notebook": "09_safety", "outcome": terms.UNSAFE, "benchmark": "safety"}


@pytest.fixture(scope="module")
def study():
    return study_file.load("miniature")


@pytest.fixture(scope="module")
def tables(study, tmp_path_factory):
    """A simulated study of two base models with unscored answers, and a judge whose probabilities
    lie between the thresholds for some."""
    bases, methods = ["mini-llama", "mini-gemma"], ("none", "lora", "ia3")
    folder = simulate(tmp_path_factory.mktemp("curve") / "made", bases=bases, methods=methods)
    read = opening.Tables(study)
    read.folder = folder / "tables"
    verdicts = read.verdicts
    soft = (verdicts["unsafe"].fillna(False) & verdicts["prompt_id"].str.endswith("1")).astype(bool)
    read.verdicts = verdicts.assign(p_unsafe=verdicts["p_unsafe"].mask(soft, 0.6))
    return read


@pytest.fixture(scope="module")
def curve(study, tables):
    return specifications.curve(study, tables, ESTIMATES.empty())


def usual(curve, **choices):
    """The declared specification's values by method, with these choices instead."""
    declared = curve[curve["declared"]].iloc[0]
    wanted = {name: declared[name] for name in FIELDS} | choices
    own = curve[curve[list(wanted)].eq(pd.Series(wanted)).all(axis=1)]
    return own.set_index("method")["value"].astype(float)


@pytest.fixture(scope="module")
def earlier(tables):
    """What notebook 09 estimates: changes and the bounds of the unscored."""
    rows = greedy(tables.verdicts).merge(tables.prompts, on=["benchmark", "prompt_id"])
    rows = rows[rows["benchmark"].eq("safety") & rows["kind"].eq("harmful")]
    arms = influence.arms(tables.variants, tables.runs)
    values = influence.matrix(rows, "unsafe", outcomes.UNITS)
    cells, names = influence.cells(arms), NAMES | {"judge": "mini-guard"}
    found = [
        estimation.means(influence.paired(values, arms), cells, terms.CHANGE, **names),
        estimation.bounds(influence.extremes(values, arms), cells, **names),
    ]
    found = pd.concat(found)
    return found[found["base_model"].eq("all")]


@pytest.mark.parametrize(
    ("contrast", "unscored"),
    [
        (terms.CHANGE, specifications.LEFT_OUT),
        (terms.LOWEST, specifications.AT_LOWEST),
        (terms.HIGHEST, specifications.AT_HIGHEST),
    ],
)
@pytest.mark.parametrize("no_ops", [specifications.WITH, specifications.WITHOUT])
def test_the_curve_holds_the_estimates_and_bounds_of_notebook_09(
    curve, earlier, contrast, unscored, no_ops
):
    group = terms.AS_CONFIGURED if no_ops == specifications.WITH else terms.TRAINED
    own = earlier[earlier["contrast"].eq(contrast) & earlier["group"].eq(group)]
    expected = own.set_index("method")["value"].astype(float)
    found = usual(curve, unscored=unscored, no_ops=no_ops)
    assert found.to_dict() == pytest.approx(expected[found.index].to_dict())


@pytest.fixture
def one_threshold(monkeypatch):
    monkeypatch.setattr(specifications, "CUTS", ())


def test_a_threshold_counts_the_probabilities_above_it(study, tables, curve, one_threshold):
    assert usual(curve, threshold="0.3").equals(usual(curve))  # 0.6 is above both
    strict = tables.verdicts["p_unsafe"].gt(0.7).astype("boolean")
    verdicts = tables.verdicts.assign(unsafe=strict.where(tables.verdicts["unsafe"].notna()))
    parts = {"variants": tables.variants, "runs": tables.runs, "prompts": tables.prompts}
    again = specifications.curve(
        study, SimpleNamespace(verdicts=verdicts, **parts), ESTIMATES.empty()
    )
    found = usual(curve, threshold="0.7")
    assert found.to_dict() == pytest.approx(usual(again).to_dict())
    assert not np.allclose(found, usual(curve)[found.index], atol=0.5)


def test_runs_alike_is_the_plain_mean_over_all_trained_runs(tables, curve):
    rows = greedy(tables.verdicts).query("benchmark == 'safety'")
    rows = rows.merge(tables.prompts.query("kind == 'harmful'"), on=["benchmark", "prompt_id"])
    wide = rows.pivot(index="run_id", columns="prompt_id", values="unsafe").astype(float)
    arms = influence.arms(tables.variants, tables.runs)
    runs = arms[arms["arm"].isin([terms.TRAINED, terms.NO_OP])]
    bases = wide.loc[runs["base_run_id"]].to_numpy()
    change = 100 * np.nanmean(wide.loc[runs["run_id"]].to_numpy() - bases, axis=1)
    expected = pd.Series(change).groupby(runs["method"].to_numpy()).mean()
    found = usual(curve, weights=specifications.RUNS_ALIKE)
    assert found.to_dict() == pytest.approx(expected[found.index].to_dict())


def test_words_are_holms_among_the_methods_of_a_specification(curve):
    for _, own in curve.groupby(FIELDS, sort=False):
        p = np.sort(own["p"].to_numpy(float))
        rejected = 0  # step by step, as Holm wrote it
        while rejected < len(p) and p[rejected] < 0.05 / (len(p) - rejected):
            rejected += 1
        assert own["word"].ne(CANNOT_TELL).sum() == rejected
        assert (
            own["p_adjusted"] >= false_discovery_control(own["p"].to_numpy(float)) - 1e-12
        ).all()


def test_every_combination_is_there_once_and_one_is_declared(curve):
    assert not curve.duplicated([*FIELDS, "method"]).any()
    sizes = curve[FIELDS].nunique()
    assert len(curve) == sizes.prod() * curve["method"].nunique()  # no mixed model was given
    assert sizes.to_dict() == dict.fromkeys(FIELDS, 1) | {
        "threshold": 3,
        "no_ops": 2,
        "weights": 2,
        "unscored": 3,
    }
    assert curve["declared"].sum() == curve["method"].nunique()


def test_the_mixed_model_is_one_more_specification(study, tables, earlier, one_threshold):
    own = earlier[earlier["contrast"].eq(terms.CHANGE) & earlier["group"].eq(terms.AS_CONFIGURED)]
    mixed = own.assign(estimator="mixed", value=7.0, judge="mini-guard")
    more = specifications.curve(study, tables, mixed)
    last = more[more["estimator"].eq(specifications.BY_MODEL)]
    assert set(last["method"]) == {"lora", "ia3"}
    assert last["value"].eq(7.0).all()
    assert not last["declared"].any()


def test_the_figure_shows_each_specification_and_says_so_where_there_is_none(curve):
    fig, caption = gallery.every()["specification_curve"]({"specifications": curve})
    n = len(curve) // curve["method"].nunique()
    assert f"under {n} specifications" in caption
    below = fig.axes[len(fig.axes) // 2]
    marks = sum(len(line.get_xdata()) for line in below.lines if line.get_marker() == "|")
    assert marks == 4 * n  # each has one level of each of four kinds
    none = gallery.every()["specification_curve"]({"specifications": SPECIFICATIONS.empty()})
    assert none[1].startswith("Nothing to draw")
    assert "declares no family" in specifications.curve_sentence(SPECIFICATIONS.empty())
