"""`make status`: what is done, runs, failed and is to do, from a study's folder alone."""

import json
import os
import subprocess
import sys
import time

import pytest

from conftest import one_sentence
from driftbook.batch import jobs, leases, make_status, plan, shards
from driftbook.batch.make_status import status_lines
from driftbook.models.sampling import OutOfMemory, VariantFailure
from driftbook.study import progress
from test_shards import many  # noqa: F401


def do(study, job, fail=lambda variant: None):
    """Do a job's variants, of which some fail."""

    def work(variant, folder):
        if error := fail(variant):
            raise error
        return []

    stage, base, _ = job.split("/")
    variants = jobs.job_variants(study, base, shards.read_shards(study).run_ids(job), stage)
    return jobs.run_variants(stage, study, base, variants, lambda variant: [], work)


def test_what_was_not_begun_is_said_with_the_command(many):  # noqa: F811
    [line] = status_lines(many, "my study.yaml")
    assert line == "many: not begun; make study STUDY='my study.yaml' begins it"


def test_done_failed_and_to_do_are_counted(many):  # noqa: F811
    plan.write(many, 2)
    [one, other] = shards.read_shards(many).jobs("train", "tiny-llama")
    first, second = shards.read_shards(many).run_ids(one)[-2:]
    errors = {first: VariantFailure("training diverged"), second: OutOfMemory("out of memory")}
    do(many, one, lambda variant: errors.get(variant.run_id))
    lines = status_lines(many, "many")
    assert lines[0].startswith(f"many: {len(shards.read_shards(many).run_ids(one))} of ")
    [diverged, hungry] = [line for line in lines if line.startswith("failed: ")]
    assert first in diverged
    assert "with other settings" in diverged
    assert second in hungry
    assert "more memory" in hungry
    assert all("02_train.tiny-llama.0.ipynb" in line for line in (diverged, hungry))
    [todo] = [line for line in lines if line.startswith("to do: ")]
    assert f"train {len(shards.read_shards(many).run_ids(other))}," in todo
    assert lines[-1] == "nothing runs; make study STUDY=many goes on"


def test_what_runs_is_named_with_its_host_and_how_far_it_is(many, monkeypatch):  # noqa: F811
    plan.write(many, 2)
    [one, _] = shards.read_shards(many).jobs("train", "tiny-llama")
    run_id = shards.read_shards(many).run_ids(one)[0]
    folder = many.folder / "runs" / run_id
    with progress.reported(jobs.progress_path(many, one), 7) as told:
        told.begin(run_id)
        told.counts = {"steps": 3}
        told._write()
        with leases.leased(folder, "train", leases.Watch()) as lease:
            [line] = [one for one in status_lines(many, "many") if one.startswith("running")]
            assert "train tiny-llama 1/2: train variant 1 of 7, 3 steps" in line
            assert f"on {lease.words['host']}, for 0 min" in line
            elsewhere = lease.words | {"machine": "other", "host": "n2", "job": "77"}
            lease.path.write_text(json.dumps(elsewhere))
            [line] = [one for one in status_lines(many, "many") if one.startswith("running")]
            assert "on n2, Slurm job 77, for" in line
            os.utime(lease.path, (1.7e9, 1.7e9))
            [line] = [one for one in status_lines(many, "many") if one.startswith("running")]
            assert "n2, Slurm job 77, which was last heard of" in line
            for wrong in (-7200, 7200):  # this machine's clock against that of the folder
                now, real = time.time(), time.time
                with monkeypatch.context() as skewed:
                    skewed.setattr(time, "time", lambda real=real, wrong=wrong: real() + wrong)
                    lease.path.write_text(json.dumps(elsewhere | {"held": 600.0}))
                    [line] = [one for one in status_lines(many, "many") if "running" in one]
                    assert line.endswith("on n2, Slurm job 77, for 10 min")
                    os.utime(lease.path, (now - 180, now - 180))
                    [line] = [one for one in status_lines(many, "many") if "running" in one]
                    assert line.endswith("which was last heard of 3 min ago")
        assert not [one for one in status_lines(many, "many") if one.startswith("running")]


def test_status_changes_no_file_and_imports_no_models(many):  # noqa: F811
    plan.write(many, 2)
    do(many, "train/tiny-llama/0")
    before = {path: path.stat().st_mtime_ns for path in many.folder.rglob("*")}
    status_lines(many, "many")
    assert {path: path.stat().st_mtime_ns for path in many.folder.rglob("*")} == before
    code = "import sys, driftbook.batch.make_status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_study_that_is_not_there_is_one_sentence(capsys):
    assert make_status.main("nowhere") == 2
    assert "no study file" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("had", [0.5, 2.0])
def test_a_failure_for_want_of_memory_waits_for_more(many, had, monkeypatch):  # noqa: F811
    plan.write(many, 1)
    job = "train/tiny-llama/0"
    run_id = shards.read_shards(many).run_ids(job)[-1]
    errors = {run_id: OutOfMemory("out of memory")}
    do(many, job, lambda variant: errors.get(variant.run_id))
    assert plan.write(many, 1) == ""
    here = jobs.devices.device_memory()
    monkeypatch.setattr(jobs.devices, "device_memory", lambda: here / had)
    again = "more now" in plan.write(many, 1)
    assert again == (had < 1)
    done = do(many, job).set_index("run_id")
    assert done.status[run_id] == ("ok" if again else "failed")
    assert done.reused.sum() == len(done) - again
