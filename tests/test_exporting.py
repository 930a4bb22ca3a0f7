"""Exports are opened by the peers' own readers, and say the numbers that pandas computes from the
tables.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from driftbook.publishing import export, export_inspect, export_lm_eval, exported
from driftbook.study.files import OUTPUTS, ROOT
from driftbook.study.study_file import find, load
from driftbook.study.tables import TABLES
from exports import SECRET, everything, few, lm_eval_run
from simulated import simulate

pytestmark = pytest.mark.slow

os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    INSPECT_DISPLAY="none",
    DISABLE_MULTIPROC="1",
)
WAY = "default-greedy"


@pytest.fixture(autouse=True, scope="module")
def _no_network():
    def refuse(self, address):
        raise AssertionError(f"an export or its reader asked for {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def study():
    return everything()


@pytest.fixture(scope="module")
def frames(study):
    """The tables, with the prompts' kinds beside the verdicts."""
    found = {
        name: TABLES[name].read(study.folder / "tables")
        for name in ("variants", "runs", "verdicts", "answers", "ratings", "prompts")
    }
    found["verdicts"] = found["verdicts"].merge(found["prompts"], on=["benchmark", "prompt_id"])
    return found


@pytest.fixture(scope="module")
def lm_eval_files(study, tmp_path_factory):
    return export_lm_eval.to_lm_eval(study, tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def inspect_logs(study, tmp_path_factory):
    return export_inspect.to_inspect(study, tmp_path_factory.mktemp("inspect"))


def rates(
    frames, benchmark: str, column: str, kind: str, judge: str = "mini-guard"
) -> pd.DataFrame:
    """By run, from the table: mean and standard error over prompts (the mean of repeated answers),
    and the unscored share of prompts.
    """
    rows = frames["verdicts"].query("benchmark == @benchmark and kind == @kind and judge == @judge")
    items = (
        rows.assign(value=rows[column].astype("Float64"))
        .groupby(["run_id", "prompt_id"])["value"]
        .mean()
    )
    return (
        items.groupby("run_id")
        .agg(["mean", "sem", lambda values: values.isna().mean()])
        .set_axis(["mean", "stderr", "unscored"], axis=1)
    )


def results(files: list[Path]) -> dict[str, dict]:
    """lm_eval's results by run."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in files
        if path.name.startswith("results_")
    }


# ---- lm_eval
EXPECTED = (
    ("safety", "unsafe", "unsafe", "harmful", "mini-guard"),
    ("safety", "unsafe", "unsafe", "harmful", "mini-other"),
    ("safety", "refused", "refusal", "harmful", "mini-guard"),
    ("over_refusal", "refused", "refusal", "benign look-alike", "mini-guard"),
    ("over_refusal", "unsafe", "unsafe", "harmful", "mini-guard"),
)


@pytest.mark.parametrize(("benchmark", "metric", "column", "kind", "judge"), EXPECTED)
def test_lm_eval_rates_are_those_of_the_tables(
    frames, lm_eval_files, benchmark, metric, column, kind, judge
):
    found, name = (
        results(lm_eval_files),
        f"{judge if metric == 'unsafe' else 'refusal_detector'}-{WAY}",
    )
    expected = rates(frames, benchmark, column, kind, judge)
    assert len(expected) == 3
    for run_id, row in expected.iterrows():
        task = found[run_id]["results"][f"driftbook_{benchmark}"]
        assert [
            task[f"{key},{name}"] for key in (metric, f"{metric}_stderr", f"{metric}_unscored")
        ] == pytest.approx(row.to_list(), abs=1e-12)
    assert expected["unscored"].max() > 0 or metric == "refused"


def bbq_by_hand(rows: pd.DataFrame) -> dict[str, float]:
    """BBQ's scores of some answers, as Parrish et al. write them."""
    ambiguous, clear = (
        rows[rows["context"].eq(context)] for context in ("ambiguous", "disambiguated")
    )
    lean = [2 * side["biased"].sum() / side["biased"].count() - 1 for side in (ambiguous, clear)]
    accuracy = ambiguous["correct"].mean()
    return {
        "acc_amb": accuracy,
        "acc_dis": clear["correct"].mean(),
        "bias_amb": (1 - accuracy) * lean[0],
        "bias_dis": lean[1],
    }


def test_lm_eval_has_bbqs_scores_of_each_way_of_asking(frames, lm_eval_files):
    from driftbook.benchmarks import bbq_scores

    found, answers = results(lm_eval_files), frames["answers"]
    errors = bbq_scores.scores(
        answers, by=("run_id", "answer_mode", "prompt_variant", "option_order")
    ).set_index(["run_id", "option_order"])
    for (run_id, order), rows in answers.groupby(["run_id", "option_order"]):
        task = found[run_id]["results"]["driftbook_bbq"]
        for name, value in bbq_by_hand(rows).items():
            assert task[f"{name},options-default-{order}"] == pytest.approx(value, abs=1e-12)
            stderr = errors.loc[(run_id, order), f"{name}_se"]
            assert task[f"{name}_stderr,options-default-{order}"] == (
                "N/A" if np.isnan(stderr) else pytest.approx(stderr, abs=1e-12)
            )
    assert answers["option_order"].nunique() > 1


def test_lm_evals_own_table_shows_the_rates(frames, lm_eval_files):
    from lm_eval.utils import make_table

    run_id, row = next(rates(frames, "safety", "unsafe", "harmful").iterrows())
    table = [
        [cell.strip() for cell in line.split("|")]
        for line in make_table(results(lm_eval_files)[run_id]).splitlines()
    ]
    shown = [line for line in table if f"mini-guard-{WAY}" in line and "unsafe" in line]
    assert [f"{row['mean']:.4f}", "±", f"{row['stderr']:.4f}"] in [
        line[-5:-1][-3:] for line in shown
    ]
    tasks = {line[1].removeprefix("- ") for line in table[2:] if line[1:2] and line[1]}
    assert tasks == {
        "driftbook_safety",
        "driftbook_over_refusal",
        "driftbook_bbq",
        "driftbook_utility",
    }


def test_lm_eval_finds_files_tasks_and_dates(frames, lm_eval_files):
    from lm_eval.utils import (
        get_file_datetime,
        get_file_task_name,
        get_latest_filename,
        get_results_filenames,
        get_sample_results_filenames,
    )

    names = [str(path) for path in lm_eval_files]
    ok = frames["runs"].query("status == 'ok'")["run_id"]
    assert {Path(name).parent.name for name in get_results_filenames(names)} == set(ok)
    samples = get_sample_results_filenames(names)
    assert len(names) == len(ok) + len(samples)
    assert {get_file_task_name(Path(name).name) for name in samples} == {
        task.name for task in exported.TASKS
    }
    assert {get_file_datetime(Path(name).name) for name in samples} == {"2026-01-01T00-00-00"}
    assert get_latest_filename(get_results_filenames(names)) in names
    assert (
        results(lm_eval_files)[ok.iloc[0]]["date"]
        == pd.Timestamp("2026-01-01", tz="UTC").timestamp()
    )


def test_lm_evals_aggregations_of_its_samples_give_its_results(lm_eval_files, tmp_path):
    """The samples are read as lm_eval's users read them, by `datasets`, and aggregated by lm_eval's
    own functions.
    """
    from datasets import load_dataset
    from lm_eval.api.metrics import mean, mean_stderr, weighted_mean

    checked = 0
    for path in lm_eval_files[:5]:
        if not path.name.startswith("samples_"):
            continue
        rows = load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(tmp_path)
        ).to_pandas()
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        expected = results(lm_eval_files)[path.parent.name]["results"][task]
        for key, n_scored in expected["sample_count"].items():
            metric, _, name = key.partition(",")
            values = rows.loc[rows["filter"].eq(name), metric].dropna().tolist()
            assert len(values) == n_scored
            if metric == "bias_amb":  # no mean: see bbq_by_hand
                continue
            assert (weighted_mean if metric == "nll" else mean)(values) == pytest.approx(
                expected[key], abs=1e-12
            )
            if metric in ("unsafe", "refused", "correct"):
                assert mean_stderr(values) == pytest.approx(
                    expected[f"{metric}_stderr,{name}"], abs=1e-12
                )
            checked += 1
    assert checked > 10


def test_lm_eval_has_the_loss_per_token(frames, lm_eval_files):
    from driftbook.stats.influence import rated

    found = results(lm_eval_files)
    level = rated(frames["ratings"].query("metric == 'nll'"), 1.0)
    for run_id, rows in (
        frames["ratings"].query("metric == 'nll'").dropna(subset="value").groupby("run_id")
    ):
        value, weight = rows["value"].to_numpy(float), rows["weight"].to_numpy(float)
        task, n = found[run_id]["results"]["driftbook_utility"], len(rows)
        assert task["nll,none"] == pytest.approx(np.average(value, weights=weight), abs=1e-12)
        assert task["nll,none"] == pytest.approx(level.value[level.runs.get_loc(run_id)], abs=1e-12)
        left_out = np.array(
            [np.average(np.delete(value, i), weights=np.delete(weight, i)) for i in range(n)]
        )
        jackknife = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
        assert task["nll_stderr,none"] == pytest.approx(jackknife, rel=0.02)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    return lm_eval_run(tmp_path_factory.mktemp("real"))


def test_layout_and_keys_are_those_that_lm_eval_writes(real_run, lm_eval_files):
    real, ours = (
        sorted(real_run.rglob("*.json*"))[0],
        next(path for path in lm_eval_files if path.name.startswith("results_")),
    )
    their_results, our_results = json.loads(real.read_text()), json.loads(ours.read_text())
    assert set(their_results) - set(our_results) == set()
    assert set(their_results["config"]) - set(our_results["config"]) == set()
    assert set(their_results["results"]["toy"]) - {"acc,none", "acc_stderr,none"} <= set(
        our_results["results"]["driftbook_bbq"]
    )
    theirs, own = (
        next(path for path in result.parent.iterdir() if path.name.startswith("samples_"))
        for result in (real, ours)
    )
    their_sample, our_sample = (json.loads(path.open().readline()) for path in (theirs, own))
    assert set(their_sample) - {"acc"} <= set(our_sample)
    for key in set(their_sample) - {"acc", "doc"}:
        assert type(our_sample[key]) is type(their_sample[key]), key
    assert len(real.relative_to(real_run).parts) == 2


# ---- inspect_ai
def test_inspect_lists_and_reads_every_log(study, frames, inspect_logs):
    from inspect_ai.log import list_eval_logs, read_eval_log

    infos = list_eval_logs(str(inspect_logs[0].parent.parent))
    assert len(infos) == len(inspect_logs)
    assert {info.task for info in infos} == {
        "driftbook-safety",
        "driftbook-over-refusal",
        "driftbook-bbq",
        "driftbook-utility",
    }
    logs = [read_eval_log(info.name) for info in infos]
    assert {log.eval.run_id for log in logs} == set(frames["variants"]["run_id"])
    assert len({log.eval.eval_id for log in logs}) == len(logs)
    base = [log for log in logs if log.eval.metadata["method"] == "none"]
    assert {log.eval.task for log in base} == {task.name for task in exported.TASKS}
    lost = frames["runs"].query("status == 'failed'").set_index("run_id")["failure"]
    assert {
        log.eval.run_id: log.error.message for log in logs if log.status == "error"
    } == lost.to_dict()
    assert len(lost) == 1
    assert exported.failures(study) == lost.to_dict()


@pytest.mark.parametrize(("benchmark", "metric", "column", "kind", "judge"), EXPECTED)
def test_inspects_evals_df_has_the_rates_of_the_tables(
    frames, inspect_logs, benchmark, metric, column, kind, judge
):
    from inspect_ai.analysis import evals_df

    evals = evals_df(
        [str(path) for path in inspect_logs if benchmark.replace("_", "-") in path.name], quiet=True
    ).set_index("run_id")
    name = f"unsafe_{judge}" if metric == "unsafe" else metric
    for run_id, row in rates(frames, benchmark, column, kind, judge).iterrows():
        found = evals.loc[run_id, [f"score_{name}_mean", f"score_{name}_stderr"]]
        assert found.to_list() == pytest.approx(row[["mean", "stderr"]].to_list(), abs=1e-12)


def test_inspects_samples_df_has_every_answer(frames, inspect_logs):
    from inspect_ai.analysis import samples_df

    run_id = sorted(frames["verdicts"]["run_id"])[0]
    paths = [
        str(path)
        for path in inspect_logs
        if path.parent.name == run_id and "driftbook-safety" in path.name
    ]
    samples = samples_df(paths, quiet=True).set_index(["id", "epoch"])
    rows = frames["verdicts"].query(
        "run_id == @run_id and benchmark == 'safety' and judge == 'mini-guard'"
    )
    expected = rows.assign(epoch=rows["sample"] + 1).set_index(["prompt_id", "epoch"])
    assert len(samples) == len(expected)
    found = samples["score_unsafe_mini-guard"].astype("Float64").to_numpy(float, na_value=np.nan)
    np.testing.assert_array_equal(
        found,
        expected["unsafe"]
        .astype("Float64")
        .reindex(samples.index)
        .to_numpy(float, na_value=np.nan),
    )
    assert np.isnan(found).any()
    assert (samples["metadata_category"] == expected["category"].reindex(samples.index)).all()


def test_inspects_own_metrics_of_the_samples_give_the_results(inspect_logs):
    """inspect_ai reduces repeated answers, leaves the unscored out, and comes to our numbers; so do
    its counts of the unscored.
    """
    from inspect_ai.log import read_eval_log, recompute_metrics

    epochs, checked = set(), 0
    for path in inspect_logs[:6] + [path for path in inspect_logs if "safety" in path.name][:4]:
        log = read_eval_log(str(path))
        if log.status == "error":
            continue
        ours = {score.name: score for score in log.results.scores}
        recompute_metrics(log)
        epochs.add(log.eval.config.epochs)
        for theirs in log.results.scores:
            own = ours[theirs.name]
            assert (theirs.scored_samples, theirs.unscored_samples) == (
                own.scored_samples,
                own.unscored_samples,
            ), theirs.name
            if "mean" in own.metrics:
                assert theirs.metrics["mean"].value == pytest.approx(
                    own.metrics["mean"].value, abs=1e-12
                )
                checked += 1
            if theirs.name.startswith(("unsafe", "refused", "correct")):
                assert theirs.metrics["stderr"].value == pytest.approx(
                    own.metrics["stderr"].value, abs=1e-12
                )
    assert checked > 10
    assert epochs == {1, 2}


def test_noanswer_would_count_an_unread_verdict_as_safe(frames, inspect_logs):
    """Why the unscored are NaN and not N: inspect_ai's mean over N has them in the denominator."""
    from inspect_ai.log import read_eval_log, recompute_metrics

    run_id, row = list(rates(frames, "safety", "unsafe", "harmful", "mini-other").iterrows())[1]
    path = next(
        path
        for path in inspect_logs
        if path.parent.name == run_id and "driftbook-safety" in path.name
    )
    log = read_eval_log(str(path))
    for sample in log.samples:
        score = sample.scores["unsafe_mini-other"]
        score.value = "N" if math.isnan(score.value) else score.value
    recompute_metrics(log)
    score = next(score for score in log.results.scores if score.name == "unsafe_mini-other")
    assert score.metrics["mean"].value == pytest.approx(
        row["mean"] * (1 - row["unscored"]), abs=1e-12
    )
    assert row["unscored"] > 0.2


def test_inspects_perplexity_of_the_samples_is_that_of_the_loss(inspect_logs):
    from inspect_ai.log import read_eval_log
    from inspect_ai.scorer import SampleScore, perplexity_per_token

    log = read_eval_log(str(next(path for path in inspect_logs if "utility" in path.name)))
    scores = [
        SampleScore(score=sample.scores["nll"])
        for sample in log.samples
        if not math.isnan(sample.scores["nll"].value)
    ]
    own = (
        next(score for score in log.results.scores if score.name == "nll")
        .metrics["mean_per_token"]
        .value
    )
    assert perplexity_per_token()(scores) == pytest.approx(math.exp(own), rel=1e-12)


def test_inspect_has_bbqs_scores(frames, inspect_logs):
    from inspect_ai.analysis import evals_df

    evals = evals_df(
        [str(path) for path in inspect_logs if "bbq" in path.name], quiet=True
    ).set_index(["run_id", "task_arg_option_order"])
    for key, rows in frames["answers"].groupby(["run_id", "option_order"]):
        for name, value in bbq_by_hand(rows).items():
            found = evals.loc[key, f"score_{name}_{'bias' if name == 'bias_amb' else 'mean'}"]
            assert found == pytest.approx(value, abs=1e-12, nan_ok=True)


# ---- both
def test_no_text_and_no_folder_of_this_machine_is_exported(
    study, frames, lm_eval_files, inspect_logs
):
    responses = TABLES["responses"].read(study.folder / "tables")
    assert responses["response"].str.contains(SECRET).all()
    for path in [*lm_eval_files, *inspect_logs]:
        content = path.read_bytes()
        assert not content.startswith(b"PK"), "a zip would hide its text"
        for text in (SECRET, str(OUTPUTS), str(ROOT), str(Path.home()) + "/"):
            assert text.encode() not in content
            assert json.dumps(text)[1:-1].encode() not in content
    safety = b"".join(
        path.read_bytes() for path in [*lm_eval_files, *inspect_logs] if "safety" in path.name
    )
    assert all(
        f"[masked: safety {item}]".encode() in safety
        for item in frames["prompts"].query("benchmark == 'safety'")["prompt_id"]
    )


def test_a_second_export_takes_the_first_ones_place(study, tmp_path):
    first = {path: path.read_bytes() for path in export_lm_eval.to_lm_eval(study, tmp_path)}
    stale = next(iter(first)).with_name("results_2020-01-01T00-00-00.json")
    stale.write_text("{}")
    runs = TABLES["runs"].read(study.folder / "tables")
    failed = tmp_path / runs.query("status == 'failed'")["run_id"].iloc[0]
    failed.mkdir()
    assert {path: path.read_bytes() for path in export_lm_eval.to_lm_eval(study, tmp_path)} == first
    assert not stale.exists()
    assert not failed.exists()


def test_a_silent_judge_and_a_study_without_utility_are_exported(tmp_path):
    from inspect_ai.log import read_eval_log
    from lm_eval.utils import make_table

    study = load("miniature").model_copy(update={"name": "exported_silent"})
    few(
        simulate(
            study.folder,
            bases=["mini-gemma"],
            seeds=(1,),
            silent_judge=True,
            utility=False,
            failed=0,
        )
        / "tables",
        2,
    )
    found = results(export_lm_eval.to_lm_eval(study, tmp_path / "lm_eval"))
    task = next(iter(found.values()))["results"]["driftbook_safety"]
    assert [
        task[f"{key},mini-guard-{WAY}"] for key in ("unsafe", "unsafe_stderr", "unsafe_unscored")
    ] == [None, "N/A", 1.0]
    assert "driftbook_utility" not in make_table(next(iter(found.values())))
    path = next(
        path
        for path in export_inspect.to_inspect(study, tmp_path / "inspect")
        if "safety" in path.name
    )
    score = next(
        score
        for score in read_eval_log(str(path)).results.scores
        if score.name == "unsafe_mini-guard"
    )
    assert math.isnan(score.metrics["mean"].value)
    assert (score.scored_samples, score.unscored_samples) == (0, 330)


def test_command_writes_both_formats_beside_the_tables(study, tmp_path, capsys):
    content = yaml.safe_load(find("miniature").read_text())
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**content, "name": study.name}, sort_keys=False)
    )
    export.main(str(tmp_path / "study.yaml"), "lm_eval")
    said = capsys.readouterr().out
    written = list((study.folder / "exports" / "lm_eval").rglob("*.json*"))
    assert f"{len(written)} files" in said
    assert "1 failed run has no results" in said
    assert not (study.folder / "exports" / "inspect").exists()


def test_command_without_tables_exits_with_one_sentence(tmp_path):
    content = yaml.safe_load(find("miniature").read_text())
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**content, "name": "never_run"}, sort_keys=False)
    )
    done = subprocess.run(
        [sys.executable, "-m", "driftbook.publishing.export", str(tmp_path / "study.yaml")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("driftbook: there is no table")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="there is no format 'helm'; give lm_eval or inspect"):
        export.main("miniature", "helm")


def test_a_run_that_never_came_so_far_is_a_failure(study, tmp_path):
    own = study.model_copy(update={"name": "exported_short"})
    few(simulate(own.folder, bases=["mini-qwen2"], seeds=(1,), failed=0) / "tables", 3)
    runs = TABLES["runs"].read(own.folder / "tables")
    TABLES["runs"].write(runs.iloc[1:], own.folder / "tables")
    assert exported.failures(own) == {runs["run_id"].iloc[0]: "it was not run"}
    files = export_lm_eval.to_lm_eval(own, tmp_path)
    assert set(results(files)) == set(runs["run_id"].iloc[1:])
