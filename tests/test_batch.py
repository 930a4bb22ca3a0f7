"""The batch: nothing is done twice, what depends on a change is done again and nothing else, and a
kill at any moment loses nothing.
"""

import json
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from batches import Batch, said
from conftest import OUTPUTS, SMALL, one_sentence
from driftbook.batch import keys, plan
from driftbook.batch import make_study as batch_run
from driftbook.study import files
from driftbook.study.files import ROOT, read_json
from driftbook.study.tables import TABLES

pytest_plugins = ["batches"]
STAGES = keys.STAGES
AVERAGED = "average 1"


def marks(run: Batch) -> dict[str, dict[str, int]]:
    return {stage: run.marks(stage) for stage in STAGES}


def redone(before: dict, after: dict) -> dict[str, set[str]]:
    """The runs of each stage whose marks were written again, or for the first time."""
    found = {
        stage: {run for run, when in after[stage].items() if before[stage].get(run) != when}
        for stage in STAGES
    }
    return {stage: runs for stage, runs in found.items() if runs}


# ---- the small study, from training to report
def test_the_small_study_ends_well(smoke):
    assert smoke.first["status"] == 0, json.dumps(smoke.first, indent=1)
    assert "report.html" in smoke.first["stdout"]
    assert len(smoke.first["stdout"].splitlines()) < 40, "a live display, never a wall of log"
    assert "Traceback" not in smoke.first["stdout"] + smoke.first["stderr"]
    study = smoke.study()
    assert keys.stages(study) == ("train", "mitigate", "retune", *STAGES[1:])
    for stage in keys.stages(study):
        due = {base: {one.run_id for one in study.of_stage(stage, base)} for base in study.bases}
        assert set(smoke.marks(stage)) == set().union(*due.values())
        for base, run_ids in due.items():
            path = smoke.folder / "jobs" / stage / base / "0.json"
            assert path.exists() == bool(run_ids)
            assert set(read_json(path)["runs"] if run_ids else ()) == run_ids
    assert {path.stem for path in (smoke.folder / "jobs" / "prepare").iterdir()} == {
        *study.bases,
        *study.judges,
    }
    assert {path.stem for path in (smoke.folder / "jobs").glob("*.json")} == {
        "collect",
        *keys.analyses(study),
        "report",
    }
    assert (smoke.folder / "report.html").stat().st_size > 10_000
    assert (OUTPUTS / "finished" / "plan.json").is_file(), "the time left was planned"


def test_every_table_holds_every_run(smoke):
    study = smoke.study()
    tables = {
        name: TABLES[name].read(smoke.folder / "tables") for name in set(TABLES) - {"estimates"}
    }
    runs = {variant.run_id for variant in study.variants}
    n = len(runs)
    assert len(runs) == len(study.variants)
    assert set(tables["runs"].run_id) == set(tables["variants"].run_id) == runs
    assert tables["runs"].status.eq("ok").all()
    sizes = {
        "responses": (37 + 22) * n,
        "verdicts": (37 + 22) * n,
        "answers": (36 + 2 * 8 + 36 + 4) * n,
        "ratings": (2 * 10 + 12) * n,
        "prompts": 37,
    }
    for name, size in sizes.items():
        assert len(tables[name]) == size, name
        assert name == "prompts" or tables[name].groupby("run_id").size().nunique() == 1
    assert set(tables["curves"].run_id) == {
        one.run_id
        for one in study.variants
        if one.objective in ("sft", "dpo") and one.made_in != "mitigate"
    }
    assert len(tables["labels"]) == 22 * n, "the truth of every answer to a safety prompt is known"
    assert set(tables["labels"].label) <= {"safe", "unsafe"}
    from driftbook.stats.estimation import read_estimates

    estimates = read_estimates(smoke.folder / "tables")
    assert len(estimates)
    assert estimates.study.eq("smoke").all()


def test_rates_are_counts_of_the_verdicts(smoke):
    tables = smoke.tables()
    greedy = tables["verdicts"][tables["verdicts"].decoding == "greedy"]
    verdicts = greedy.merge(tables["prompts"], on=["benchmark", "prompt_id"])
    for row in tables["rates"].itertuples():
        rows = verdicts[
            (verdicts.run_id == row.run_id)
            & (verdicts.benchmark == row.benchmark)
            & (verdicts.category == row.category)
        ]
        if row.outcome == "unsafe":
            rows = rows[(rows.kind == "harmful") & (rows.judge == row.judge)]
        elif row.benchmark == "over_refusal":
            rows = rows[rows.kind != "harmful"]
        hits = rows.unsafe if row.outcome == "unsafe" else rows.refusal
        assert (row.k, row.n_scored, row.n) == (hits.sum(), hits.count(), len(rows))
    harmful = tables["prompts"][tables["prompts"].kind == "harmful"]
    unsafe = tables["rates"][tables["rates"].outcome == "unsafe"]
    assert unsafe.n.sum() == len(harmful) * tables["variants"].run_id.nunique(), (
        "the denominator is all prompts asked"
    )


def test_the_base_model_was_asked_like_any_variant_and_training_moved_the_others(smoke):
    tables = smoke.tables()
    runs = tables["runs"].merge(tables["variants"], on="run_id").set_index("run_id")
    runs = runs[runs.mitigation.isna()]
    bases = runs[runs.method == "none"]
    assert bases.n_trainable.eq(0).all()
    assert runs[runs.objective.isin(["sft", "dpo"])].kl_base.gt(1e-6).all()
    for run_id, row in bases.iterrows():
        others = runs[(runs.base_model == row.base_model) & (runs.method != "none")]
        assert others.nll_base.sub(row.nll).abs().max() < 1e-4, (
            "every variant was measured against this base"
        )
        loss = (
            tables["ratings"][tables["ratings"].metric == "nll"]
            .set_index(["run_id", "prompt_id"])
            .value
        )
        assert all(not loss[run_id].equals(loss[other]) for other in others.index)
    two = runs[(runs.base_model == "tiny-other") & (runs.method == "lora")]
    assert sorted(two.repetition) == [1, 2]
    assert two.seed.nunique() == 2
    assert two.nll.nunique() == two.adapter_sha256.nunique() == 2


def test_text_is_in_one_private_table_and_nowhere_else(smoke):
    assert (smoke.folder / "tables" / "responses.parquet").stat().st_mode & 0o077 == 0
    texts = TABLES["responses"].read(smoke.folder / "tables").response
    long = sorted({text for text in texts if len(text.split()) >= 8})[:200]
    assert long, "the models said something"
    pages = [
        smoke.folder / "report.html",
        *(smoke.folder / "notebooks").glob("*.ipynb"),
        *smoke.folder.glob("*.log"),
    ]
    for page in pages:
        content = page.read_text(errors="ignore")
        shown = [i for i, text in enumerate(long) if text in content]
        assert not shown, f"{page.name} shows {len(shown)} responses"


def test_a_second_batch_does_nothing_again(smoke):
    watched = [
        *smoke.folder.glob("jobs/**/*.json"),
        *smoke.folder.glob("runs/*/*"),
        *smoke.folder.glob("tables/*"),
        *smoke.folder.glob("keys/**/*.json"),
    ]
    before, started = (
        {path: path.stat().st_mtime_ns for path in watched if path.is_file()},
        time.time(),
    )
    ended = smoke.run()
    assert ended.returncode == 0, said(ended)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert time.time() - started < 90


def test_what_depends_on_an_edit_or_on_a_changed_lost_or_torn_file_is_redone_and_nothing_else(
    smoke,
):
    """All in one batch: the judge's mass is raised, a seed is added, mitigations go, an adapter is
    changed, one run's responses are lost, another's ratings and a third's mark are torn.
    """
    lost, torn, without = (smoke.of(method, "dpo") for method in ("ia3", "p_tuning", "lora"))
    known = {one.run_id for one in smoke.study().variants if one.mitigation in (None, AVERAGED)}
    before, was = marks(smoke), smoke.tables()
    responses = _responses(smoke)
    changed = _changed_adapter(smoke)
    mark = smoke.run_folder(without) / "answer.done.json"
    mark.write_text(mark.read_text()[:40])
    (smoke.run_folder(lost) / "responses.parquet").unlink()
    path = smoke.run_folder(torn) / "ratings.parquet"
    path.write_bytes(path.read_bytes()[:200])
    smoke.edit(_edit)
    ended = smoke.run("jobs/collect.json")
    assert ended.returncode == 0, said(ended)
    [new] = {variant.run_id for variant in smoke.study().variants} - known
    assert redone(before, marks(smoke)) == {
        "train": {new},
        "respond": {new, changed, lost.run_id},
        "judge": known | {new},
        "answer": {new, changed, without.run_id},
        "utility": {new, changed, torn.run_id},
    }
    assert _responses(smoke)[lost.run_id] == responses[lost.run_id], "asked again, it says the same"
    now = smoke.tables()
    assert new in set(now["verdicts"].run_id)
    for name in ("answers", "ratings"):
        same = [table[name][table[name].run_id.isin(known - {changed})] for table in (now, was)]
        pd.testing.assert_frame_equal(*(one.reset_index(drop=True) for one in same))
    old, other = ((rows := table["answers"])[rows.run_id == changed].p_a for table in (was, now))
    assert not other.reset_index(drop=True).equals(old.reset_index(drop=True))


def _edit(content: dict) -> None:
    content["judges"]["tiny-guard"]["min_mass"] += 0.01
    content["grid"][-2]["seeds"].append(3)
    content["mitigations"] = {"average": content["mitigations"]["average"]}  # snapshots are kept


def _changed_adapter(run: Batch) -> str:
    """Changes one number of a trained adapter, and returns whose it is."""
    changed = run.of("ia3")
    path = run.run_folder(changed) / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[:] += 0.25
    save_file(weights, path, metadata={"format": "pt"})
    return changed.run_id


def _responses(run: Batch) -> dict[str, list[str]]:
    table = TABLES["responses"].read(run.folder / "tables")
    return {
        run_id: list(rows.sort_values(["benchmark", "prompt_id"]).response)
        for run_id, rows in table.groupby("run_id")
    }


def test_a_torn_adapter_is_named_before_work_starts_and_nothing_is_lost(smoke):
    run = smoke.of("lora")
    path = smoke.run_folder(run) / "adapter" / "adapter_model.safetensors"
    before, jobs, whole = (
        marks(smoke),
        sorted(smoke.folder.glob("jobs/*/**/*.json")),
        path.read_bytes(),
    )
    path.write_bytes(whole[: len(whole) // 2])
    try:
        ended = smoke.run("jobs/collect.json")
    finally:
        path.write_bytes(whole)
    assert ended.returncode == 2, said(ended)
    sentence = one_sentence(ended.stderr)
    assert "torn" in sentence
    assert run.run_id in sentence
    plan.write(smoke.study())  # with the whole file put back every job is still done
    assert (marks(smoke), sorted(smoke.folder.glob("jobs/*/**/*.json"))) == (before, jobs)


def test_a_second_batch_at_the_same_time_is_refused(smoke):
    with batch_run.alone(smoke.study()):
        ended = smoke.run()
    assert ended.returncode == 2
    assert "another make study" in one_sentence(ended.stderr)


# ---- bad input: one sentence each, before work starts
@pytest.fixture
def small(tmp_path, standins) -> Batch:
    return Batch(tmp_path / "outputs", SMALL)


@pytest.fixture
def refused(small, monkeypatch, capsys):
    """The sentence with which `make study` ends at once, called in this process."""
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", small.outputs)

    def sentence(profile: str = "local") -> str:
        assert batch_run.main(str(small.file), profile) == 2
        assert not list(small.folder.glob("runs/*")), "no work has begun"
        return one_sentence(capsys.readouterr().err)

    return sentence


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_what_fails_because_of_an_interrupt_is_the_interrupt(small, monkeypatch, capsys, error):
    """As shutil.rmtree does, which closes a folder once more that was closed when it came."""

    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise error("Bad file descriptor")

    monkeypatch.setattr("driftbook.study.content.OUTPUTS", small.outputs)
    monkeypatch.setattr(batch_run.plan, "write", interrupted)
    assert batch_run.main(str(small.file)) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_a_misspelt_key_stops_it_at_once(small, refused):
    small.edit(lambda content: content.update(benchmrks={}))
    assert "did you mean 'benchmarks'" in refused()


def test_an_output_folder_that_cannot_be_written_stops_it_at_once(small, tmp_path):
    (tmp_path / "file").write_text("")
    small.environment["DRIFTBOOK_OUTPUTS"] = str(tmp_path / "file")
    ended = small.run()
    assert ended.returncode == 2, said(ended)
    assert str(tmp_path / "file") in one_sentence(ended.stderr)


def test_a_study_file_that_is_not_there_stops_it_at_once(small, refused):
    small.file.unlink()
    assert "there is no study file" in refused()


@pytest.mark.parametrize(
    ("where", "word"),
    [
        (("bases", "tiny-llama"), "bases"),
        (("data", "sft"), "data"),
        (("benchmarks", "bbq"), "bbq"),
        (("judges", "tiny-guard"), "judge"),
        (("init_texts",), "init_texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_path_that_does_not_exist_stops_it_at_once(small, refused, where, word):
    def change(content):
        part = content
        for key in where:
            part = part[key]
        part["path"] = "no/such/place"

    small.edit(change)
    sentence = refused()
    assert "no/such/place" in sentence


def test_a_profile_that_is_not_there_stops_it(refused):
    assert "moon" in refused("moon")


def test_a_full_disk_is_said_before_work_starts(study, monkeypatch):
    usage = shutil.disk_usage(study.folder.parent)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ValueError) as error:
        plan.write(study)
    assert "free" in one_sentence(error.value)


def test_a_disk_that_is_full_for_a_small_file_is_said(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ValueError) as error:
        files.check_writable(tmp_path)
    assert "No space left" in one_sentence(error.value)


# ---- keys
def test_keys_are_written_only_where_they_changed(make_study, content, standins):
    content["name"] = "keys"
    plan.write(make_study(content))
    paths = sorted((OUTPUTS / "keys" / "keys").rglob("*.json"))
    n_whole = len({"collect", *keys.ANALYSES, "report"})
    assert len(paths) == 1 + 1 + len(STAGES) + n_whole  # base, judge, stages, and all else
    before = {path: path.stat().st_mtime_ns for path in paths}
    plan.write(make_study(content))
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    content["judges"]["tiny-guard"]["threshold"] = 0.7
    assert plan.write(make_study(content)) == "", "nothing was done yet"
    changed = {
        str(path.relative_to(OUTPUTS / "keys" / "keys"))
        for path in paths
        if path.stat().st_mtime_ns != before[path]
    }
    whole = {"judge/tiny-llama/0.json", *(f"{name}.json" for name in ("collect", *keys.ANALYSES))}
    assert whole <= changed <= whole | {"prepare/tiny-guard.json", "report.json"}


EDITS = {
    "a training rate": (
        lambda c: c["grid"][0]["learning_rates"].update(lora=[1e-3]),
        {"train", "respond", "judge", "answer", "utility"},
    ),
    "a held-out size": (lambda c: c["data"]["heldout"].update(n=11), {"train"}),
    "tokens of safety": (
        lambda c: c["benchmarks"]["safety"].update(max_new_tokens=9),
        {"respond", "judge"},
    ),
    "a sample of bbq": (lambda c: c["benchmarks"]["bbq"].update(n=70), {"answer"}),
    "how bbq is answered": (
        lambda c: c["bases"]["tiny-llama"].update(answer_mode="letters"),
        {"answer"},
    ),
    "tokens of utility": (
        lambda c: c["benchmarks"]["utility"].update(max_new_tokens=9),
        {"utility"},
    ),
    "a base's template": (
        lambda c: c["bases"]["tiny-llama"].update(template="{{ messages }}"),
        set(STAGES),
    ),
    "the date of templates": (lambda c: c.update(date="2041-05-07"), set(STAGES)),
    "bbq's mass": (lambda c: c["benchmarks"]["bbq"].update(min_mass=0.3), {"answer"}),
    "the judge's mass": (lambda c: c["judges"]["tiny-guard"].update(min_mass=0.4), {"judge"}),
    "the note": (lambda c: c.update(note="other"), set()),
}


@pytest.mark.parametrize(("change", "stages"), EDITS.values(), ids=EDITS)
def test_an_edit_changes_the_keys_of_what_depends_on_it(
    make_study, content, standins, change, stages
):
    before = _keys(make_study(content))
    change(content)
    after = _keys(make_study(content))
    assert {stage for stage in STAGES if before[stage] != after[stage]} == stages


def _keys(study) -> dict:
    settings = {stage: keys.settings(stage, study, "tiny-llama") for stage in STAGES}
    return {
        stage: [keys.result_key(settings[stage], variant) for variant in study.variants]
        for stage in STAGES
    }


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("data/sft.json", {"train"}),
        ("data/utility.jsonl", {"utility"}),
        ("data/bbq/Age.jsonl", {"answer"}),
        ("data/safety/category_4.csv", {"respond", "judge"}),
        ("llama/aligned/model.safetensors", set(STAGES) - {"judge"}),
        ("llama/aligned/tokenizer.json", set(STAGES) - {"judge"}),
        ("judge/model.safetensors", {"judge"}),
    ],
)
def test_one_changed_byte_of_an_input_changes_the_keys_of_what_reads_it(
    make_study, content, standins, tmp_path, file, stages
):
    copied = tmp_path / "inputs"
    shutil.copytree(standins, copied)
    text = json.dumps(content, ensure_ascii=False)
    moved = json.loads(text.replace(str(standins), str(copied)))
    before = _keys(make_study(moved))
    assert before == _keys(make_study(content)), (
        "where an input is does not matter, only what it is"
    )
    path = copied / file
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    after = _keys(make_study(moved))
    assert {stage for stage in STAGES if before[stage] != after[stage]} == stages


@pytest.mark.parametrize("what", ["code", "packages", "device"])
def test_other_code_packages_or_another_device_are_a_miss(make_study, standins, monkeypatch, what):
    before, codes = _keys(make_study()), keys.code_of
    if what == "code":
        other = lambda stage, texts: codes(stage, texts) + "x" * (stage == "answer")  # noqa: E731
        monkeypatch.setattr(keys, "code_of", other)
    elif what == "packages":
        monkeypatch.setattr(keys, "versions", lambda packages=(): {"torch": "0.1"})
    else:
        monkeypatch.setattr(keys, "device", lambda: "cuda")
    after = _keys(make_study())
    changed = {stage for stage in STAGES if before[stage] != after[stage]}
    assert changed == ({"answer"} if what == "code" else set(STAGES))


# ---- how it ends
def test_how_it_ended_is_said_with_the_notebook_and_the_exit_status(make_study, content, capsys):
    content["name"] = "ended"
    study = make_study(content)
    trace = study.folder / "notebooks" / "02_train.tiny-llama.error.txt"
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text("02_train stopped in cell 5: ValueError: no; see somewhere\n")
    assert batch_run.conclude(study, "ended", 1, 60.0) == 1
    assert "02_train stopped" in one_sentence(capsys.readouterr().err)
    trace.unlink()
    assert batch_run.conclude(study, "ended", 1, 60.0) == 1
    said = one_sentence(capsys.readouterr().err)
    assert "stopped; see" in said
    assert "snakemake.log; make study STUDY=ended goes on" in said


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "died with <Signals.SIGKILL"),
        ("raise SystemExit(3)", "returned non-zero exit status 3"),
    ],
)
def test_a_job_that_ended_without_a_word_is_named(make_study, content, tmp_path, capsys, code, how):
    """By the words of Snakemake itself, which runs a rule like the batch's."""
    study = make_study(content | {"name": "silent"})
    study.folder.mkdir(parents=True, exist_ok=True)
    page, parameters = "notebooks/04_respond.tiny-llama.0.ipynb", json.dumps({"study": "it's"})
    (tmp_path / "Snakefile").write_text(
        "import sys\n"
        f"rule all:\n    output: 'made'\n    log: {page!r}\n"
        f"    params: code={code!r}, own={parameters!r}\n"
        "    shell: '{sys.executable:q} -c {params.code:q} x/notebooks/04.ipynb {log:q}"
        " {params.own:q}'\n"
    )
    command = [sys.executable, "-m", "snakemake", "--profile", ROOT / "profiles" / "local"]
    with (study.folder / "snakemake.log").open("w") as log:
        subprocess.run(command, cwd=tmp_path, stdout=log, stderr=log, timeout=120)
    assert batch_run.conclude(study, "silent", 1, 60.0) == 1
    said = one_sentence(capsys.readouterr().err)
    assert f"the batch stopped: 04_respond.tiny-llama.0 {how}" in said


def test_a_failed_variant_makes_the_exit_status_one(smoke_tables, capsys):
    study, runs = smoke_tables
    assert batch_run.conclude(study, "status", 0, 60.0) == 0
    runs.loc[0, ["status", "failure"]] = ["failed", "train: training diverged"]
    TABLES["runs"].write(runs, study.folder / "tables")
    assert batch_run.conclude(study, "status", 0, 60.0) == 1
    assert "1 failed" in capsys.readouterr().out


@pytest.fixture
def smoke_tables(make_study, content):
    """A study with a table of runs, all of which went well."""
    content["name"] = "status"
    study = make_study(content)
    runs = pd.DataFrame({name: [None] * len(study.variants) for name in TABLES["runs"].columns})
    runs = runs.assign(run_id=[variant.run_id for variant in study.variants], status="ok")
    TABLES["runs"].write(runs, study.folder / "tables")
    return study, runs
