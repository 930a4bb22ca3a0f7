"""How a study's variants are dealt to jobs; another number of shards does nothing again."""

import copy
import os
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SMALL, one_sentence, write_study
from driftbook.batch import (
    costing,
    gpus,
    jobs,
    keys,
    make_plan,
    notebooks,
    plan,
    rates,
    schedule,
    shards,
)
from driftbook.batch.cluster import Cluster
from driftbook.batch.rates import USUAL
from driftbook.study.files import read_json, write_json
from driftbook.study.study_file import PLANNED, load, study_digest

START = USUAL.job
COSTS = st.lists(st.floats(0.0, 1e5), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_variant_is_dealt_once_and_no_shard_is_much_dearer_than_another(costs, n):
    run_ids = [str(place) for place in range(len(costs))]
    dealt = shards._deal(run_ids, costs, n)
    assert sorted(chain(*dealt)) == sorted(run_ids)
    assert len(dealt) == min(n, len(costs))
    assert all(shard == sorted(shard, key=int) for shard in dealt), "in the study's order"
    loads = [sum(costs[int(one)] for one in shard) for shard in dealt]
    assert max(loads) - min(loads) <= max(costs) + 1e-6


@pytest.mark.parametrize(
    ("costs", "workers", "wanted"),
    [
        ([3600.0], 8, [8]),  # one base model, eight GPUs
        ([3600.0, 3600.0], 8, [4, 4]),
        ([1800.0] * 4, 2, [1, 1, 1, 1]),
        ([3600.0, 30.0], 2, [2, 1]),
        ([10.0], 8, [1]),  # to load the model again takes as long
        ([3600.0, 1200.0], 1, [1, 1]),
    ],
)
def test_a_stage_has_as_many_shards_as_keep_the_workers_busy(costs, workers, wanted):
    assert shards._counts(costs, workers, START) == wanted


@given(st.lists(st.floats(60.0, 1e5), min_size=1, max_size=5), st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_no_deal_keeps_a_worker_waiting_for_long(costs, workers):
    """At most a quarter longer than if work could be cut anywhere, and the start of two jobs."""
    counts = shards._counts(costs, workers, START)
    ideal = (sum(costs) + START * sum(counts)) / workers
    assert shards._finish(costs, counts, workers, START) <= 1.25 * ideal + 2 * START


@pytest.mark.parametrize(("error", "least"), [(0.0, 0.95), (0.1, 0.85)])
def test_eight_workers_spend_their_time_in_variants(monkeypatch, error, least):
    """The jobs of `quick`, an hour for eight workers of a CPU, played: what each waits for, the
    start of each, and seconds that are not as planned by 10 % (a standard deviation).
    """
    study, workers = load("quick"), 8
    rows = costing.seconds(study, USUAL)
    hour = 3600 * workers / rows.seconds.sum()
    monkeypatch.setattr(costing, "seconds", lambda *_: rows.assign(seconds=rows.seconds * hour))
    planned = schedule.jobs(study, USUAL, shards.dealt(study, workers, keep=False))
    for rng in map(np.random.default_rng, range(10)):
        took = {
            name: replace(
                job,
                pieces={
                    run_id: replace(piece, seconds=piece.seconds * rng.lognormal(0, error))
                    for run_id, piece in job.pieces.items()
                },
            )
            for name, job in planned.items()
        }
        worked = sum(job.seconds - job.overhead for job in took.values())
        assert worked / (workers * schedule.finish(took, workers)) >= least


@pytest.fixture
def many(tmp_path, standins, monkeypatch):
    """A small study of twelve trained variants, planned for a number of workers."""
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    content = copy.deepcopy(SMALL) | {"name": "many"}
    content["grid"][0] |= {"methods": ["lora"], "objectives": ["sft"], "seeds": list(range(1, 13))}
    study = load(write_study(tmp_path, content))

    def costs(study, due):
        return {name: dict.fromkeys(run_ids, 60.0) for name, run_ids in due.items()}, START

    monkeypatch.setattr(shards, "_costs", costs)
    return study


def finish(study, stage):
    """Do all jobs of a stage, each variant with a file of its name; the run_ids that were worked
    on.
    """
    worked = []

    def work(variant, folder):
        worked.append(variant.run_id)
        (folder / "made").write_text(variant.run_id)
        return [folder / "made"]

    for job in shards.read_shards(study).jobs(stage, "tiny-llama"):
        wanted = jobs.job_variants(
            study, "tiny-llama", shards.read_shards(study).run_ids(job), stage
        )
        jobs.run_variants(stage, study, "tiny-llama", wanted, lambda variant: [], work)
    return worked


def test_another_number_of_shards_does_nothing_again(many):
    plan.write(many, 4)
    assert len(finish(many, "train")) == len(many.variants)
    for workers in (2, 5, 1, 4):
        assert plan.write(many, workers) == ""
        dealt = shards.read_shards(many)
        assert len(dealt.jobs("train", "tiny-llama")) == workers
        for job in dealt.jobs("train", "tiny-llama"):
            mark, key = plan.job_mark(many, job), shards.path_of(many, "keys", job)
            assert read_json(mark)["runs"].keys() == set(dealt.run_ids(job))
            assert mark.stat().st_mtime >= key.stat().st_mtime, "Snakemake has nothing to do"
        assert len(list((many.folder / "jobs" / "train").rglob("*.json"))) == workers
        assert len(list((many.folder / "keys" / "train").rglob("*.json"))) == workers
        assert not any(job.startswith("train/") for job in plan.due(many, dealt))
    assert finish(many, "train") == []


def test_a_plan_for_a_cluster_is_dealt_and_counted_for_it(many, monkeypatch):
    asked = Cluster(partition="gpu", jobs=6, gpu_memory=80, hours=1)
    monkeypatch.setattr(gpus, "at_once", lambda: 2)
    assert make_plan.to_run(many).startswith("prepare 2, train 2,")
    assert make_plan.to_run(many, asked).startswith("prepare 2, train 6,")
    said = make_plan._hours(many, USUAL, None, asked)[-1]
    assert "on the cluster, 6 jobs at a time" in said
    plan.write(many, 6)
    with monkeypatch.context() as on_a_node:
        on_a_node.setattr(keys, "device", lambda: "cuda")
        finish(many, "train")
    assert make_plan.finished(many)["train"] == 0, "this login node has no GPU"
    assert make_plan.finished(many, asked.device)["train"] == len(many.variants)
    monkeypatch.setattr(rates, "here", lambda _: "this machine's")
    assert schedule.known_rates(many, None) == "this machine's"
    assert schedule.known_rates(many, asked).name == rates.PUBLISHED_GPU


def test_a_finished_variant_is_kept_where_others_of_its_shard_are_due(many):
    plan.write(many, 4)
    first = shards.read_shards(many).run_ids("train/tiny-llama/0")
    wanted = jobs.job_variants(many, "tiny-llama", first, "train")
    jobs.run_variants("train", many, "tiny-llama", wanted, lambda variant: [], lambda one, at: [])
    plan.write(many, 1)
    assert "train/tiny-llama/0" in plan.due(many, shards.read_shards(many))
    assert set(finish(many, "train")) == {one.run_id for one in many.variants} - set(first)


def test_a_job_waits_for_the_shards_that_made_its_variants_alone(many):
    plan.write(many, 4)
    dealt = shards.read_shards(many)
    for job in dealt.jobs("respond", "tiny-llama"):
        made = {one for name in dealt.before(job, many) for one in dealt.run_ids(name)}
        assert set(dealt.run_ids(job)) <= made
        assert len(dealt.before(job, many)) <= len(dealt.run_ids(job))
    planned = schedule.jobs(many, USUAL, dealt)
    for job, what in planned.items():
        assert set(what.after) <= planned.keys(), job
    assert {job for job in planned if job.count("/") == 2} == {
        job for stage in keys.stages(many) for job in dealt.jobs(stage, "tiny-llama")
    }


def test_a_job_has_its_variants_in_the_studys_order(many):
    plan.write(many, 2)
    order = [one.run_id for one in many.variants]
    for job in shards.read_shards(many).jobs("train", "tiny-llama"):
        run_ids = shards.of_key(shards.path_of(many, "keys", job))
        assert run_ids == [one for one in order if one in run_ids]
        assert len(run_ids) > 1


def test_content_decides_what_is_due_whatever_the_clocks_say(many):
    """Marks of a machine whose clock is ahead, an edit, and the edit taken back."""
    plan.write(many, 2)
    finish(many, "train")
    [one, other] = shards.read_shards(many).jobs("train", "tiny-llama")
    ahead = plan.job_mark(many, one).stat().st_mtime + 86_400
    for job in (one, other):
        os.utime(plan.job_mark(many, job), (ahead, ahead))
    assert plan.write(many, 2) == ""
    assert plan.job_mark(many, one).stat().st_mtime < ahead - 80_000
    for job in (one, other):
        os.utime(plan.job_mark(many, job), (ahead, ahead))
    mark = read_json(plan.job_mark(many, other))
    write_json(plan.job_mark(many, other), mark | {"settings": "others"})
    os.utime(plan.job_mark(many, other), (ahead, ahead))
    assert "train" in plan.write(many, 2)
    assert plan.due(many, shards.read_shards(many)) >= {other}
    assert one not in plan.due(many, shards.read_shards(many))
    key = shards.path_of(many, "keys", other)
    assert plan.job_mark(many, other).stat().st_mtime < key.stat().st_mtime
    for torn in ("[]", "null", "{", ""):
        plan.job_mark(many, one).write_text(torn)
        plan.write(many, 2)
        assert one in plan.due(many, shards.read_shards(many))


def test_a_study_file_that_is_edited_while_the_study_runs_stops_its_jobs(
    many, tmp_path, monkeypatch
):
    path = tmp_path / "study.yaml"
    monkeypatch.setenv(PLANNED, f"{study_digest(many)} {path}")
    text = path.read_text()
    assert load(path).name == "many"
    path.write_text(text.replace("max_new_tokens: ", "max_new_tokens: 1"))
    assert path.read_text() != text
    with pytest.raises(ValueError) as error:
        load(path)
    assert "edited while the study runs" in one_sentence(error.value)
    path.write_text(f"# a comment\n{text}")
    assert load(path).name == "many", "it says the same"


def test_what_a_notebook_made_by_hand_of_an_edited_file_is_no_job_of_the_plan(many, monkeypatch):
    """Edited, a notebook opened by hand, and edited back: the edit's results are not served."""
    plan.write(many, 1)
    edited = many.model_copy(update={"seed": 7})
    assert study_digest(edited) != study_digest(many)
    job = "train/tiny-llama/0"
    wanted = jobs.job_variants(edited, "tiny-llama", shards.read_shards(many).run_ids(job), "train")
    jobs.run_variants("train", edited, "tiny-llama", wanted, lambda variant: [], lambda one, at: [])
    assert job in plan.due(many, shards.read_shards(many))
    assert len(finish(many, "train")) == len(wanted), "of another seed, so all anew"


def test_what_an_analysis_wrote_is_made_again_where_it_is_gone_or_torn(many):
    made = {"tables/a.parquet": b"table", "figures/a.png": b"figure", "report.html": b"page"}
    made["notebooks/09_safety.ipynb"] = b'{"cells": []}'
    for name, content in made.items():
        (many.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (many.folder / name).write_bytes(content)
    plan.write(many, 1)
    mark = plan.job_mark(many, "safety")
    key = read_json(shards.path_of(many, "keys", "safety"))
    elsewhere = many.folder / "labels" / "sheet.csv"
    notebooks.write_mark(mark, key, [*(many.folder / name for name in made), elsewhere])
    assert read_json(mark)["files"].keys() == made.keys(), "sheets are edited by people"
    assert plan.write(many, 1) == ""
    for name, content in made.items():
        path = many.folder / name
        path.unlink()
        assert plan.write(many, 1) == f"to do again: safety ({name} is gone)"
        path.write_bytes(content[:3])
        assert f"safety ({name} is changed)" in plan.write(many, 1)
        assert "safety" in plan.due(many, shards.read_shards(many))
        path.write_bytes(content)
        assert plan.write(many, 1) == ""
    (many.folder / "notebooks" / "09_safety.ipynb").write_text('{"cells": [], "metadata": {}}')
    assert plan.write(many, 1) == "", "it was opened and saved"
