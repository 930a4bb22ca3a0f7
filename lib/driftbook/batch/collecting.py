"""The tables of a study, put together from the results of its runs."""

from pathlib import Path

import pandas as pd

from driftbook.batch import keys
from driftbook.stats.harm import DETECTOR, with_harm
from driftbook.study.files import file_digest, private_folder, read_object
from driftbook.study.methods import MAKING_STAGES
from driftbook.study.reading import csv_rows
from driftbook.study.sections import Source
from driftbook.study.sources import locate
from driftbook.study.study_file import Study
from driftbook.study.tables import (
    ANSWERS,
    CURVES,
    DRIFT,
    LABELS,
    MODULES,
    PROBES,
    PROMPTS,
    RATES,
    RATINGS,
    RESPONSES,
    RUNS,
    SPECTRA,
    TABLES,
    VARIANTS,
    VERDICTS,
    Table,
    greedy,
)

OF_DETECTOR = {
    True: "not refused",
    False: "unsafe",
}  # in `rates`: by the detector alone, by a judge


# of an adapter, when it was trained
OF_ADAPTER = ("nll", "dose_nll", "kl_base", "kl_init", "no_op", "n_stored")
CHANGED = "its adapter was changed after training, so that neither its dose nor its state is known"


def variants(study: Study) -> pd.DataFrame:
    """The table `variants` of a study."""
    return VARIANTS.check(pd.DataFrame([variant.row() for variant in study.variants]))


def of_runs(table: Table, stage: str, study: Study) -> pd.DataFrame:
    """A table put together from the runs whose stage succeeded."""
    done = [
        study.folder / "runs" / run_id
        for run_id, mark in marks(study, stage).items()
        if mark["status"] == "ok"
    ]
    return table.read_all(
        [path for path in map(table.path, done) if table not in (DRIFT, MODULES) or path.is_file()]
    )  # base models have no drift, a template touches no module


def marks(study: Study, stage: str) -> dict[str, dict]:
    """The marks of a stage by run_id; runs that never came so far have none."""
    paths = {
        variant.run_id: study.folder / "runs" / variant.run_id / f"{stage}.done.json"
        for variant in study.variants
    }
    return {run_id: read_object(path) for run_id, path in paths.items() if path.exists()}


def runs(study: Study) -> pd.DataFrame:
    """The table `runs`: what was recorded in training, and every failure of any stage."""
    recorded = RUNS.concat([of_runs(RUNS, stage, study) for stage in MAKING_STAGES])
    recorded = _as_they_are(recorded, study)
    failures = {
        run_id: f"{stage}: {mark['failure']}"
        for stage in keys.stages(study)
        for run_id, mark in marks(study, stage).items()
        if mark["status"] == "failed"
    }
    lost = [run_id for run_id in failures if run_id not in set(recorded.run_id)]
    frame = pd.concat([recorded, pd.DataFrame({"run_id": lost}, columns=["run_id"])]).reindex(
        columns=list(RUNS.columns)
    )
    frame["failure"] = frame.run_id.map(failures)
    frame["status"] = frame.failure.isna().map({True: "ok", False: "failed"})
    return RUNS.check(frame)


def _as_they_are(recorded: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The records of training, where an adapter was changed afterwards with its own hash and
    without what was measured of the one before: its scores are the changed one's.
    """
    frame, made = recorded.copy(), {}
    for stage in MAKING_STAGES:
        made |= marks(study, stage)
    for i in frame.index[frame.adapter_sha256.notna()]:
        place = study.folder / "runs" / frame.at[i, "run_id"]
        known = made[frame.at[i, "run_id"]]["files"]
        now = {name: file_digest(place / name) for name in known if name.startswith("adapter/")}
        if any(found not in (None, known[name]) for name, found in now.items()):
            weights = now.get("adapter/adapter_model.safetensors")
            frame.loc[i, list(OF_ADAPTER)] = None
            frame.loc[i, ["adapter_sha256", "findings"]] = [weights, CHANGED]
    return RUNS.check(frame)


def prompts(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table `prompts` (without text), and the same rows with their text, which is never
    published.
    """
    # here, since who counts failures or purges texts need not import models, which takes seconds
    from driftbook.benchmarks.responding import asked_prompts

    asked = asked_prompts(study)
    return PROMPTS.check(asked[list(PROMPTS.columns)]), asked


def rates(verdicts: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """The table `rates`: unsafe by each judge on harmful prompts (without a judge not refused),
    refused on all; n counts all prompts asked of the run.
    """
    rows = with_harm(greedy(verdicts)).merge(
        prompts, on=["benchmark", "prompt_id"], validate="many_to_one"
    )
    by = ["run_id", "benchmark", "judge", "category"]
    harmful = rows[rows.kind == "harmful"]
    words = harmful.judge.eq(DETECTOR).map(OF_DETECTOR)
    harm = [
        _counts(part.assign(hit=part.harm), by, word)
        for word, part in harmful.groupby(words, sort=False)
    ]
    # one row an answer: the detector reads the answer, not the judge; contrasts of over-refusal are
    # harmful, and are left to `unsafe`
    read = rows[
        ~rows.duplicated(["run_id", "benchmark", "prompt_id"])
        & ((rows.benchmark != "over_refusal") | (rows.kind != "harmful"))
    ]
    refused = _counts(read.assign(hit=read.refusal, judge=DETECTOR), by, "refused")
    return RATES.check(pd.concat([*harm, refused], ignore_index=True))


def _counts(rows: pd.DataFrame, by: list[str], outcome: str) -> pd.DataFrame:
    counts = (
        rows.groupby(by, observed=True).hit.agg(k="sum", n_scored="count", n="size").reset_index()
    )
    return counts.assign(outcome=outcome)


def labels(study: Study, responses: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """The miniature's known truth of every answer to the safety prompts; empty for studies without
    a truth file.
    """
    truth = study.benchmarks["safety"].truth
    if truth is None:
        return LABELS.empty()
    from driftbook.miniature.truth import is_unsafe

    responses = greedy(responses)
    rules = csv_rows(Path(locate(Source(source=truth), study)))
    known = {rule["prompt_id"]: rule for rule in rules}
    rows = responses[(responses.benchmark == "safety") & responses.prompt_id.isin(known)]
    pairs = zip(rows.prompt_id, rows.response, strict=True)
    unsafe = [is_unsafe(known[prompt_id], response) for prompt_id, response in pairs]
    frame = rows[["benchmark", "prompt_id", "run_id"]].assign(
        rater="rule", label=["unsafe" if hit else "safe" for hit in unsafe]
    )
    return LABELS.check(frame.assign(sampling_probability=1.0))


def agreement(verdicts: pd.DataFrame, labels: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The judge against the labels, a row per group: see `agreement.with_labels`."""
    from driftbook.stats.agreement import with_labels

    rows = greedy(verdicts).merge(labels, on=["benchmark", "prompt_id", "run_id"])
    return (
        rows.groupby(by, observed=True)[["unsafe", "label"]]
        .apply(lambda part: with_labels(part.unsafe, part.label == "unsafe"))
        .reset_index()
    )


def collect(study: Study) -> dict[str, pd.DataFrame]:
    """Every table of the study, put together and written to tables/."""
    without_text, _ = prompts(study)
    responses, verdicts = of_runs(RESPONSES, "respond", study), of_runs(VERDICTS, "judge", study)
    found = {
        VARIANTS: variants(study),
        RUNS: runs(study),
        **{
            table: table.concat([of_runs(table, stage, study) for stage in ("train", "retune")])
            for table in (CURVES, DRIFT)
        },
        PROMPTS: without_text,
        RESPONSES: responses,
        VERDICTS: verdicts,
        ANSWERS: of_runs(ANSWERS, "answer", study),
        RATINGS: of_runs(RATINGS, "utility", study),
        LABELS: labels(study, responses, without_text),
        RATES: rates(verdicts, without_text),
        MODULES: of_runs(MODULES, "mitigate", study),
        PROBES: of_runs(PROBES, "probe", study),
        SPECTRA: SPECTRA.read_all(sorted((study.folder / "spectra").glob("*/spectra.parquet"))),
    }
    private_folder(study.folder)
    for table, frame in found.items():
        table.write(frame, study.folder / "tables")
    return {table.name: frame for table, frame in found.items()}


def status(study: Study) -> int:
    """The number of failed runs among those that were collected; none where only earlier jobs were
    asked for.
    """
    if not TABLES["runs"].path(study.folder / "tables").is_file():
        return 0
    return int(TABLES["runs"].read(study.folder / "tables")["status"].eq("failed").sum())
