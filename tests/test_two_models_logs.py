"""Logs that lm-eval and inspect_ai wrote themselves, and our own exports of a study, compared."""

import os
import zipfile

import numpy as np
import pandas as pd
import pytest

from conftest import one_sentence
from driftbook import stats
from driftbook.publishing import export_inspect, export_lm_eval
from driftbook.publishing.audit_logs import from_logs
from driftbook.stats import estimation, influence, terms
from driftbook.study.tables import TABLES
from exports import everything, lm_eval_run

pytestmark = pytest.mark.slow
os.environ.update(HF_DATASETS_OFFLINE="1", INSPECT_DISPLAY="none", DISABLE_MULTIPROC="1")
NUMBERS = ["value", "ci_low", "ci_high", "p"]
SHOWN = ["difference", "ci_low", "ci_high", "p"]


# ---- our own exports
@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A study, and its exports in both formats."""
    study, folder = everything(), tmp_path_factory.mktemp("exports")
    export_lm_eval.to_lm_eval(study, folder / "lm_eval")
    export_inspect.to_inspect(study, folder / "inspect")
    return study, folder


def our_rows(study, judge: str, units: list[str]) -> pd.DataFrame:
    """The change of each single run in the unsafe-response rate, as notebook 09 estimates it."""
    tables = study.folder / "tables"
    read = {name: TABLES[name].read(tables) for name in ("variants", "runs", "verdicts", "prompts")}
    arms = influence.arms(read["variants"], read["runs"])
    rows = read["verdicts"].merge(read["prompts"], on=["benchmark", "prompt_id"])
    rows = rows[rows["benchmark"].eq("safety") & rows["judge"].eq(judge)]
    values = influence.matrix(rows, "unsafe", units)
    cells = influence.cells(arms)
    labels = {"study": "s", "notebook": "n", "outcome": terms.UNSAFE}
    found = estimation.means(
        influence.paired(values, arms),
        cells[cells["group"].eq(terms.RUN)],
        terms.CHANGE,
        **labels,
        benchmark="safety",
        judge=judge,
    )
    return found[found["base_model"].ne("all")].set_index("member")


FORMATS = {
    "lm_eval": ("unsafe,{}-default-greedy", "samples_driftbook_safety_*.jsonl"),
    "inspect": ("unsafe_{}", "*_driftbook-safety_*.json"),
}
UNITS = [
    (
        "mini-guard",
        ["category", "family", "prompt_id"],
        {"stratum": "category", "cluster": "family"},
    ),
    ("mini-guard", ["category", "prompt_id"], {"stratum": "category"}),
    ("mini-other", ["benchmark", "prompt_id"], {}),
]


@pytest.mark.parametrize("format_", list(FORMATS))
@pytest.mark.parametrize(("judge", "units", "more"), UNITS)
def test_an_exported_study_gives_its_own_paired_changes(exported, format_, judge, units, more):
    study, folder = exported
    metric, name = FORMATS[format_]
    expected = our_rows(study, judge, units)
    base = next((folder / format_).glob(f"*.none.*/{name}"))
    assert len(expected) == 2
    for run_id, line in expected.iterrows():
        candidate = next((folder / format_ / run_id).glob(name))
        row = stats.compare(base, candidate, metric=metric.format(judge), **more).iloc[0]
        assert row[SHOWN].to_list() == pytest.approx(line[NUMBERS].to_list(), rel=1e-9)
        assert row["n_items"] == line["n_items"] - line["n_unscored"]
        assert row["n_unscored"] == line["n_unscored"]
        assert row["population"] == line["population"]
        assert "lower is better" in row["sentence"]


def test_ways_of_asking_are_tasks_of_their_own(exported):
    study, folder = exported
    answers = TABLES["answers"].read(study.folder / "tables")
    base = next((folder / "inspect").glob("*.none.*"))
    other = next(one for one in answers["run_id"].unique() if one != base.name)
    task = "driftbook_bbq (answer_mode=options, option_order={}, prompt_variant=default)"
    orders = {task.format(order): order for order in answers["option_order"].unique()}
    found = stats.compare(base, folder / "inspect" / other, metric=dict.fromkeys(orders, "acc_dis"))
    assert set(found["task"]) == set(orders)
    assert len(orders) > 1
    clear = answers[answers["context"].eq("disambiguated")].assign(
        correct=lambda rows: rows["correct"].astype("Float64").to_numpy(float, na_value=np.nan)
    )
    sides = clear.pivot(index="item_id", columns=["option_order", "run_id"], values="correct")
    for row in found.to_dict("records"):
        own = sides[orders[row["task"]]][[base.name, other]].dropna()
        assert row["n_items"] == len(own)
        rates = [row["base_rate"], row["candidate_rate"]]
        assert rates == pytest.approx((100 * own.mean()).to_list())
    assert "metric=" in said(base, folder / "inspect" / other)


def test_a_failed_run_is_no_side_of_a_comparison(exported):
    study, folder = exported
    lost = TABLES["runs"].read(study.folder / "tables").query("status == 'failed'")["run_id"]
    base = next((folder / "inspect").glob("*.none.*"))
    assert "ended as 'error'" in said(base, folder / "inspect" / lost.iloc[0])


def said(*arguments, **more) -> str:
    with pytest.raises(ValueError) as error:
        stats.compare(*arguments, **more)
    return one_sentence(error.value)


# ---- lm-eval's own
def test_what_lm_eval_writes_is_read(tmp_path):
    out = lm_eval_run(tmp_path)
    row = stats.compare(out, out).iloc[0]
    assert (row["task"], row["metric"], row["n_items"]) == ("toy", "acc", 4)
    assert row["difference"] == 0
    assert "nothing says" not in row["sentence"]  # the results file does
    assert from_logs(out, out)["verdicts"][0]["sentence"] == row["sentence"]
    samples = next(out.rglob("samples_*"))
    other = tmp_path / samples.name
    other.write_text(samples.read_text().replace('"doc_hash": "', '"doc_hash": "0'))
    assert "different documents" in said(samples, other)


# ---- inspect_ai's own
ANSWERS = np.random.default_rng(0).random((2, 40, 2)) < [[[0.8]], [[0.6]]]  # sides, items, epochs


def evaluated(folder, answers, status="success", lost=(), scorers=("match",), **more):
    """A log in inspect_ai's packed format of answers [items, epochs] to one task."""
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalError,
        EvalLog,
        EvalResults,
        EvalSample,
        EvalSpec,
        EvalStats,
        write_eval_log,
    )
    from inspect_ai.model import ChatMessageUser
    from inspect_ai.scorer import Score

    samples = []
    for item, row in enumerate(answers):
        for epoch, right in enumerate(row, 1):
            value = ("C" if right else "I") if not isinstance(right, dict) else right
            samples.append(
                EvalSample(
                    id=item,
                    epoch=epoch,
                    input=[ChatMessageUser(content=more.get("asks", "q") + str(item))],
                    target="t",
                    metadata={"topic": item // 4},
                    scores=None if item in lost else {name: Score(value=value) for name in scorers},
                    error=EvalError(message="timeout", traceback="", traceback_ansi="")
                    if item in lost
                    else None,
                )
            )
    spec = EvalSpec(
        created="2026-01-01T00:00:00+00:00",
        task=more.get("task", "toy"),
        dataset=EvalDataset(name="d"),
        model="m/m",
        config=EvalConfig(epochs=len(answers[0])),
    )
    log = EvalLog(
        status=status, eval=spec, results=EvalResults(), stats=EvalStats(), samples=samples
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{more.get('name', 'log')}.eval"
    write_eval_log(log, str(path))
    return path


def tables() -> list[pd.DataFrame]:
    return [
        pd.DataFrame(
            {
                "item": np.repeat(np.arange(40), 2),
                "sample": np.tile([1, 2], 40),
                "score": side.ravel(),
                "topic": np.repeat(np.arange(40) // 4, 2),
            }
        )
        for side in ANSWERS
    ]


def test_a_packed_log_with_epochs_is_its_table(tmp_path):
    logs = [evaluated(tmp_path / f"side {at}", side) for at, side in enumerate(ANSWERS)]
    assert zipfile.is_zipfile(logs[0])
    for more in ({}, {"cluster": "topic"}):
        row, expected = (stats.compare(*both, **more).iloc[0] for both in (logs, tables()))
        assert row[SHOWN].to_list() == pytest.approx(expected[SHOWN].to_list())
        assert (row["task"], row["metric"], row["n_candidate_runs"]) == ("toy", "match", 1)
        assert "nothing says" not in row["sentence"]  # C is better than I
    assert stats.compare(logs[0].parent, logs[1]).iloc[0]["p"] == stats.compare(*logs).iloc[0]["p"]
    mixed = stats.compare(logs[0], tables()[1].assign(task="toy", metric="match"))
    assert mixed.iloc[0]["difference"] == pytest.approx(row["difference"])


def test_a_sample_that_ended_in_an_error_lacks_a_score(tmp_path):
    base = evaluated(tmp_path / "base", ANSWERS[0])
    candidate = evaluated(tmp_path / "candidate", ANSWERS[1], lost=(3, 5))
    row = stats.compare(base, candidate).iloc[0]
    assert (row["n_items"], row["n_unscored"]) == (38, 2)


def test_logs_of_inspect_that_do_not_fit_are_said_in_a_sentence(tmp_path):
    base = evaluated(tmp_path / "base", ANSWERS[0])
    assert "'cancelled'" in said(base, evaluated(tmp_path / "a", ANSWERS[1], "cancelled"))
    assert "different documents" in said(base, evaluated(tmp_path / "b", ANSWERS[1], asks="other"))
    assert "only" not in (text := said(base, evaluated(tmp_path / "c", ANSWERS[1], task="x")))
    assert "different tasks" in text
    two = evaluated(tmp_path / "d", ANSWERS[1], scorers=("match", "includes"))
    assert "several metrics or filters, 'match', 'includes'" in said(two, two)
    keyed = [[{"a": 1, "b": "words"}] for _ in range(4)]
    table = evaluated(tmp_path / "e", keyed)
    assert stats.compare(table, table, metric="match,a").iloc[0]["base_rate"] == 100
    assert "a score is a str" in said(table, table, metric="match,b")
    assert "no field 'subject'; it has ['topic']" in said(base, base, cluster="subject")
    evaluated(tmp_path / "base", ANSWERS[0], name="again")
    assert "more than one log of toy" in said(tmp_path / "base", base)
    torn = tmp_path / "torn.eval"
    torn.write_bytes(base.read_bytes()[:200])
    assert "cannot be read as a log of inspect_ai" in said(torn, base)
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    assert "cannot be read as a log of inspect_ai" in said(other, base)
