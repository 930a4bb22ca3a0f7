"""What is due, and that Snakemake, which goes by the times of files, does just that: after another
deal, an edit, an edit taken back, a lost file, a failure; and what `make status` then says.
"""

import copy
import json
import time

import pytest

from conftest import SMALL, write_study
from driftbook.batch import (
    cluster,
    collecting,
    devices,
    jobs,
    keys,
    leases,
    make_status,
    notebooks,
    plan,
    purging,
    shards,
)
from driftbook.batch.make_study import alone
from driftbook.models.sampling import OutOfMemory, VariantFailure
from driftbook.study.files import read_json
from driftbook.study.study_file import load

BASE = "tiny-llama"


def content(**heldout) -> dict:
    """A small study of twelve trained variants."""
    made = copy.deepcopy(SMALL) | {"name": "due"}
    made["grid"][0] |= {"methods": ["lora"], "objectives": ["sft"], "seeds": list(range(1, 13))}
    made["data"]["heldout"] |= heldout
    return made


@pytest.fixture
def due(tmp_path, standins, monkeypatch):
    """The study; its training is dealt to all workers, and what follows is too cheap for that."""
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)

    def costs(study, run_ids):
        each = {name: 60.0 if name.startswith("train") else 0.05 for name in run_ids}
        return {name: dict.fromkeys(own, each[name]) for name, own in run_ids.items()}, 8.0

    monkeypatch.setattr(shards, "_costs", costs)
    return load(write_study(tmp_path, content()))


def finish(study, fail=lambda stage, variant: None, stages=None) -> list[tuple[str, str]]:
    """Do all jobs of the stages; what was worked on."""
    worked = []
    for stage in stages or keys.stages(study):

        def work(variant, folder, stage=stage):
            worked.append((stage, variant.run_id))
            if error := fail(stage, variant):
                raise error
            (folder / f"{stage}.made").write_text(variant.run_id)
            return [folder / f"{stage}.made"]

        def inputs(variant, stage=stage):
            return [] if stage == "train" else [jobs.folder(study, variant) / "train.made"]

        for job in shards.read_shards(study).jobs(stage, BASE):
            wanted = jobs.job_variants(study, BASE, shards.read_shards(study).run_ids(job), stage)
            jobs.run_variants(stage, study, BASE, wanted, inputs, work)
            time.sleep(0.01)
    return worked


def snakemakes(study) -> list[str]:
    """The jobs of stages that Snakemake would do: without a mark, or with an older one than their
    key or a mark that they read.
    """
    dealt, found = shards.read_shards(study), []
    for stage in keys.stages(study):
        for job in dealt.jobs(stage, BASE):
            mark, key = plan.job_mark(study, job), shards.path_of(study, "keys", job)
            read = [key, *(plan.job_mark(study, one) for one in dealt.before(job, study))]
            if not mark.exists() or any(
                one.stat().st_mtime_ns > mark.stat().st_mtime_ns for one in read
            ):
                found.append(job)
    return found


def failing(run_id, error=None):
    error = error or VariantFailure("training diverged")
    return lambda stage, variant: error if stage == "train" and variant.run_id == run_id else None


def test_another_deal_of_one_stage_has_nothing_after_it_done_again(due):
    plan.write(due, 2)
    finish(due)
    assert plan.write(due, 2) == ""
    assert snakemakes(due) == []
    assert plan.write(due, 4) == ""
    dealt = shards.read_shards(due)
    assert len(dealt.jobs("train", BASE)) > len(dealt.jobs("respond", BASE)) == 1
    assert snakemakes(due) == []


def test_a_failed_variant_is_dealt_anew_like_any_other(due, monkeypatch):
    every = lambda study, run_ids: (  # noqa: E731
        {name: dict.fromkeys(own, 60.0) for name, own in run_ids.items()},
        8.0,
    )
    monkeypatch.setattr(shards, "_costs", every)
    plan.write(due, 2)
    finish(due, failing(due.variants[3].run_id))
    assert snakemakes(due) == []
    assert plan.write(due, 4) == ""
    assert snakemakes(due) == []


def test_what_is_lost_after_another_deal_or_an_edit_taken_back_is_made_again(due, tmp_path):
    plan.write(due, 2)
    finish(due)
    plan.write(due, 4)
    edited = load(write_study(tmp_path, content(n=10)))
    assert "train" in plan.write(edited, 4)
    assert "train/tiny-llama/0" in snakemakes(edited)
    back = load(write_study(tmp_path, content()))
    assert plan.write(back, 4) == ""
    assert snakemakes(back) == []
    first = shards.read_shards(due).run_ids("train/tiny-llama/0")[0]
    (due.folder / "runs" / first / "train.made").unlink()
    assert "train" in plan.write(back, 4)
    assert "train/tiny-llama/0" in snakemakes(back)
    again = load(write_study(tmp_path, content(n=10)))
    assert "train" in plan.write(again, 4)
    assert "train/tiny-llama/0" in snakemakes(again)


def test_a_file_of_a_training_that_is_torn_is_made_again_but_a_changed_adapter_is_not(due):
    plan.write(due, 1)
    finish(due)
    folder = due.folder / "runs" / due.variants[3].run_id
    (folder / "train.made").write_text("")
    assert "train" in plan.write(due, 1)
    assert ("train", due.variants[3].run_id) in finish(due)
    assert plan.may_change("train", "adapter/adapter_config.json", "0")
    assert not plan.may_change("train", "adapter/adapter_config.json", None)
    assert not plan.may_change("respond", "adapter/adapter_config.json", "0")


def test_a_variant_whose_training_fails_now_keeps_no_older_score(due, tmp_path):
    plan.write(due, 2)
    finish(due)
    bad = due.variants[3]
    (jobs.folder(due, bad) / "adapter").mkdir()
    edited = load(write_study(tmp_path, content(n=10)))
    plan.write(edited, 2)
    finish(edited, failing(bad.run_id))
    plan.write(edited, 2)
    assert collecting.marks(edited, "train")[bad.run_id]["status"] == "failed"
    assert bad.run_id not in collecting.marks(edited, "respond")
    assert not (jobs.folder(due, bad) / "adapter").exists(), "no repair is made of it"


def test_a_job_that_ends_after_another_deal_marks_nothing(due):
    plan.write(due, 2)
    job = "train/tiny-llama/0"
    run_ids = shards.read_shards(due).run_ids(job)

    def work(variant, folder):
        if variant.run_id == run_ids[-1]:
            plan.write(due, 4)
        return []

    wanted = jobs.job_variants(due, BASE, run_ids, "train")
    jobs.run_variants("train", due, BASE, wanted, lambda variant: [], work)
    assert job in snakemakes(due)


def test_a_torn_key_is_written_again(due):
    plan.write(due, 2)
    key = shards.path_of(due, "keys", "train/tiny-llama/0")
    whole = read_json(key)
    for text in ("", "[]", "{"):
        key.write_text(text)
        plan.write(due, 2)
        assert read_json(key) == whole


def test_memory_is_that_of_where_jobs_run(due, monkeypatch):
    plan.write(due, 1)
    monkeypatch.setattr(devices, "device_memory", lambda: 24_000_000_000)
    finish(due, failing(due.variants[3].run_id, OutOfMemory("out of memory")), ["train"])
    monkeypatch.setattr(devices, "device_memory", lambda: 256_000_000_000)  # a login node's
    assert plan.write(due, 1, 24e9) == ""
    assert "more now" in plan.write(due, 1, 80e9)
    assert "more now" in plan.write(due, 1)


def test_a_piece_of_work_at_which_kernels_die_is_a_failure_in_the_end(due):
    plan.write(due, 1)
    bad = due.variants[3]
    folder, key = (
        jobs.folder(due, bad),
        plan.job_key(due, "train/tiny-llama/0")["variants"][bad.run_id],
    )
    folder.mkdir(parents=True)
    for number in range(jobs.DEATHS):
        dead = leases.own_words() | {"pid": 2**22 + 1}
        (folder / f".lease.train.{number + 1}").write_text(json.dumps(dead))
        leases.record_death(folder, "train", key)
        assert leases.deaths(folder, "train", key) == number + 1
    assert leases.deaths(folder, "train", "another") == 0, "an edit is tried anew"
    worked = finish(due, stages=["train"])
    mark = read_json(jobs.folder(due, bad) / "train.done.json")
    assert f"killed {jobs.DEATHS} times" in mark["failure"]
    assert "had" in mark
    assert {run_id for _, run_id in worked} == {one.run_id for one in due.variants} - {bad.run_id}
    assert leases.deaths(folder, "train", key) == 0
    assert "train/tiny-llama/0" not in snakemakes(due)


def test_a_killed_kernel_is_said_in_a_sentence_and_counted(tmp_path):
    import nbformat

    code = "import os\nos.kill(os.getpid(), 9)"
    given = nbformat.v4.new_code_cell("run_ids: list = []", metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[given, nbformat.v4.new_code_cell(code)])
    book.metadata.kernelspec = {"name": "python3", "display_name": "p", "language": "python"}
    nbformat.write(book, tmp_path / "dying.ipynb")
    key = tmp_path / "keys" / "train" / "base" / "0.json"
    key.parent.mkdir(parents=True)
    key.write_text(json.dumps({"variants": {"one": "k"}, "settings": {"stage": "train"}}))
    (tmp_path / shards.FILE).write_text(json.dumps({"of": {"train/base": [["one"]]}}))
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    dead = leases.own_words() | {"pid": 2**22 + 1}
    (folder / ".lease.train.1").write_text(json.dumps(dead))
    words = [str(tmp_path / "dying.ipynb"), str(tmp_path / "out.ipynb"), "{}", str(key)]
    assert notebooks.run_notebook(*words) == 1
    assert "its kernel was killed" in (tmp_path / "out.error.txt").read_text()
    assert leases.deaths(folder, "train", "k") == 1


@pytest.mark.parametrize("name", ["02_train", "04_respond", "05_judge", "06_answer", "07_utility"])
def test_a_shard_in_which_every_training_failed_runs_to_its_end(
    name, tmp_path, standins, monkeypatch
):
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    path = write_study(tmp_path, content())
    study = load(path)
    variant = study.variants[1]

    def diverges(*_):
        raise VariantFailure("training diverged")

    monkeypatch.setattr("driftbook.training.train_variant", diverges)
    if name != "02_train":
        folder = jobs.folder(study, variant)
        folder.mkdir(parents=True)
        mark = {"status": "failed", "key": "x", "failure": "training diverged"}
        (folder / "train.done.json").write_text(json.dumps(mark))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(keys.notebook(name).read_text())["cells"]
    space: dict = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), name, "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(study=str(path), base_model=BASE, run_ids=[variant.run_id])
    assert space["done"].status.eq("failed").all()


# ---- what is said
def test_status_counts_no_work_of_before_an_edit_and_says_so_of_an_unplanned_one(due, tmp_path):
    plan.write(due, 2)
    finish(due)
    before = make_status.status_lines(due, "due")[0]
    edited = load(write_study(tmp_path, content(n=10)))
    [line] = make_status.status_lines(edited, "due")
    assert line == "due was edited since it was planned; make study STUDY=due does what changed"
    plan.write(edited, 2)
    after = make_status.status_lines(edited, "due")
    assert after[0] != before
    assert f"train {len(due.variants)}" in next(one for one in after if one.startswith("to do"))


def test_status_knows_a_make_study_that_runs_no_variant_yet(due):
    plan.write(due, 2)
    with alone(due):
        assert make_status.status_lines(due, "due")[-1] == "make study runs"
    assert "nothing runs" in make_status.status_lines(due, "due")[-1]


# ---- leases and the rest
def test_a_lease_that_another_took_gave_back_and_a_third_holds_is_lost(tmp_path):
    with leases.leased(tmp_path, "train", leases.Watch()) as first:
        first.path.unlink()
        third = leases.Lease(first.path)
        third.path.write_text(json.dumps(third.words))
        first.beat()
        with pytest.raises(leases.Lost):
            first.check()
        third.check()
    third.check()


def test_a_training_that_was_taken_over_takes_no_adapter_of_its_successor(due):
    plan.write(due, 1)
    variant = due.variants[3]
    adapter = jobs.folder(due, variant) / "adapter"

    def work(one, folder):
        for lease in folder.glob(".lease.train.*"):  # another process has it by now, and is through
            lease.unlink()
        adapter.mkdir()
        raise VariantFailure("training diverged")

    task = jobs._Task("train", due, {"stage": "train"}, lambda one: [], work)
    held = leases.leased(adapter.parent, "train", leases.Watch())
    with held as lease, pytest.raises(leases.Lost):
        jobs._do(task, variant, lease)
    assert adapter.is_dir()
    assert not (adapter.parent / "train.done.json").exists()


def test_a_full_disk_leaves_no_lease(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(leases.json, "dumps", full)
        with pytest.raises(OSError, match="No space"):
            leases.leased(tmp_path, "train", leases.Watch()).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_failed_allocation_is_want_of_memory():
    assert devices.lacked_memory(OSError(12, "Cannot allocate memory"))
    assert devices.lacked_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you"))
    assert devices.lacked_memory(MemoryError())
    assert not devices.lacked_memory(OSError(28, "No space left on device"))
    assert not devices.lacked_memory(RuntimeError("a shape does not fit"))


def test_other_jobs_of_the_user_may_have_any_name(due, monkeypatch):
    own = cluster.run_name(due.folder)
    monkeypatch.setattr(cluster, "_said", lambda *_: f"12 my other job\n13 {own}_x\n")
    assert cluster.left(due) == ["13"]


def test_purge_takes_slurms_logs(due):
    log = due.folder / "slurm" / "rule" / "1.log"
    log.parent.mkdir(parents=True)
    log.write_text("text")
    purging.purge(due)
    assert not log.exists()
