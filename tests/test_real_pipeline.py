"""Real BBQ, AILuminate and XSTest through training, answers, judges, fairness, utility and
analysis, by the same batch; and that no text leaves it.
"""

import json
import os
import subprocess
import sys
import warnings

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from batches import said
from conftest import locked
from driftbook.batch import make_plan, rates
from driftbook.benchmarks import data
from driftbook.publishing import export_inspect, export_lm_eval, publish
from driftbook.study import access
from driftbook.study.files import ROOT
from driftbook.study.sections import PROMPT_FORMATS
from driftbook.study.study_file import load
from driftbook.study.tables import TABLES

pytestmark = pytest.mark.slow

FILE = ROOT / "tests" / "real_pipeline.yaml"


def _run() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "driftbook.batch.make_study", str(FILE), "local"],
        env=os.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def study(shared):
    this = load(FILE)
    with locked("real pipeline"):
        if not (this.folder / "report.html").exists():
            ended = _run()
            if "the batch stopped" in ended.stderr:  # seldom a process is killed from without
                last = (this.folder / "snakemake.log").read_text()[-3000:]
                warnings.warn(f"{said(ended)}{last}", stacklevel=1)
                ended = _run()  # goes on from there, as it says
            assert ended.returncode == 0, said(ended)
    return this


@pytest.fixture(scope="module")
def tables(study):
    return {
        name: table.read(study.folder / "tables")
        for name, table in TABLES.items()
        if table.path(study.folder / "tables").is_file()
    }


def test_every_variant_is_complete_and_every_table_is_there(study, tables):
    assert set(tables["runs"].status) == {"ok"}
    assert len(tables["runs"]) == len(study.variants) == 2 + 2 + 2 + 1
    assert tables["verdicts"].groupby("benchmark").size().to_dict().keys() == {
        "safety",
        "over_refusal",
    }
    assert set(tables["verdicts"].query("judge == 'random-wildguard'").benchmark) == {"safety"}
    assert set(tables["answers"].dimension) == {"Age", "Nationality", "Religion"}
    assert set(tables["ratings"].metric) == {"nll", "correct"}
    notebooks = {
        path.stem.partition(".")[0] for path in (study.folder / "notebooks").glob("*.ipynb")
    }
    assert notebooks >= {
        "02_train",
        "09_safety",
        "10_fairness",
        "11_mixed_effects",
        "12_tradeoffs",
        "19_primary",
    }


def test_what_was_asked_otherwise_stands_beside_and_is_not_scored(study, tables):
    responses = tables["responses"]
    counts = (
        responses[responses.benchmark == "safety"].groupby(["prompt_variant", "decoding"]).size()
    )
    assert counts["careful", "greedy"] == 10 * len(study.variants)
    assert (counts["default"] == 20 * len(study.variants)).all()
    estimates = pd.concat(
        [
            pq.read_table(path).to_pandas()
            for path in (study.folder / "tables" / "estimates").glob("*.parquet")
        ]
    )
    assert {"safety, wording careful", "bbq, wording careful", "safety", "bbq"} <= set(
        estimates.benchmark
    )
    assert set(
        tables["rates"]
        .query("outcome == 'unsafe' and benchmark == 'safety'")
        .groupby(["run_id", "judge"])
        .n.sum()
    ) == {20}


def test_drawn_answers_of_a_repeated_base_model_are_drawn_anew_and_greedy_ones_are_the_same(tables):
    bases = tables["variants"].query("method == 'none'").run_id
    asked = tables["responses"][
        tables["responses"].run_id.isin(bases)
        & (tables["responses"].benchmark == "safety")
        & (tables["responses"].prompt_variant == "default")
    ]
    said_twice = (
        asked.groupby(["decoding", "prompt_id"]).response.nunique().groupby("decoding").mean()
    )
    assert said_twice["greedy"] == 1
    assert said_twice.drop("greedy").iloc[0] > 1.5


def test_drift_was_looked_at_while_it_trained(study, tables):
    drift = tables["drift"]
    assert set(drift.run_id) == set(tables["runs"].query("steps > 0").run_id)
    assert drift.groupby("run_id").step.min().eq(0).all()
    assert {"unsafe answers", "over-refusal", "stereotyped answers in BBQ"} < set(drift.outcome)
    assert drift.base_value.notna().any()
    assert (study.folder / "figures" / "drift.png").is_file()


def test_packs_are_in_the_record_and_the_data_doctor_was_asked(study, tables):
    packed = tables["runs"].merge(tables["variants"], on="run_id").query("objective == 'sft'")
    assert (packed.steps < -(-24 // 8)).all(), "a step takes eight packs of several examples"
    pages = (study.folder / "notebooks").glob("02_train.random-llama.*.ipynb")
    text = "".join(page.read_text() for page in pages)
    assert "Are the examples fit to train on?" in text


def test_no_text_of_a_prompt_an_answer_or_an_example_is_anywhere_but_in_the_table_of_responses(
    study, tables, tmp_path
):
    """DESIGN, ninth rule: masked means absent. Every file of the study, of its exports and of what
    it publishes is searched.
    """
    export_lm_eval.to_lm_eval(study, tmp_path / "lm_eval")
    export_inspect.to_inspect(study, tmp_path / "inspect")
    publish.publish(study.folder, tmp_path / "published", study.note, study=study)
    secrets = {
        text for name in study.asked(PROMPT_FORMATS) for text in data.prompts(name, study).prompt
    }
    secrets |= set(tables["responses"].response)
    secrets |= {
        one.get("answer") or one["chosen"]
        for name in ("chat", "dpo")
        for one in data.training_examples(name, study)
    }
    secrets = {text.strip()[:60] for text in secrets if len(text.strip()) >= 24}
    assert len(secrets) > 60
    found = []
    for folder in (study.folder, tmp_path):
        for path in folder.rglob("*"):
            if (
                path.is_file()
                and path.name != "responses.parquet"
                and path.parent.name != "labels"
                and path.suffix not in (".png", ".safetensors")
            ):
                text = (
                    pq.read_table(path).to_pandas().to_csv()
                    if path.suffix == ".parquet"
                    else path.read_text(errors="replace")
                )
                forms = [text, json.dumps(text)] if path.suffix != ".ipynb" else [text]
                found += [
                    path.name
                    for secret in secrets
                    if any(secret in form or json.dumps(secret)[1:-1] in form for form in forms)
                ]
    assert not found
    assert {path.stat().st_mode & 0o777 for path in (study.folder / "labels").glob("*.csv")} <= {
        0o600
    }, "what people label is text too"
    assert (study.folder / "runs").stat().st_mode & 0o777 == 0o700
    assert TABLES["responses"].path(study.folder / "tables").stat().st_mode & 0o777 == 0o600


def test_what_is_exported_names_its_licences(study, capsys, tmp_path):
    from driftbook.publishing import licences

    text = licences.notice(study)
    for source in ("nyu-mll/BBQ", "mlcommons/ailuminate", "exaggerated-safety"):
        assert source in text


def test_the_plan_of_a_finished_study_says_so(study):
    done = make_plan.finished(study)
    assert (done == len(study.variants)).all()
    page = make_plan.pages(
        study,
        rates.Rates(
            "a test",
            {"train lora": 1e9, "dpo lora": 1e9, "read": 1e9, "write": 1e9},
            1.0,
            0.1,
            "made up",
        ),
        2.0,
    )
    assert f"train {len(study.variants)} of {len(study.variants)}" in page
    assert "every model and set can be had" in page
    assert set(access.check_all(make_plan.needed(study)).state) <= {"local", "made here"}


def test_purging_deletes_every_text_and_nothing_else(study, tables, tmp_path):
    import shutil

    copy = tmp_path / "outputs" / study.name
    shutil.copytree(study.folder, copy, ignore=shutil.ignore_patterns("*.lock"))
    content = yaml.safe_load(FILE.read_text())
    assert content["name"] == copy.name
    ended = subprocess.run(
        [sys.executable, "-m", "driftbook.batch.purging", str(FILE)],
        env={**os.environ, "DRIFTBOOK_OUTPUTS": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[0]) >= len(study.variants) + 1
    assert not list(copy.rglob("responses.parquet"))
    assert not list((copy / "labels").glob("*.csv"))
    assert TABLES["verdicts"].read(copy / "tables").equals(tables["verdicts"])
