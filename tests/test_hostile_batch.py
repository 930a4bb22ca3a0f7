"""What surrounds a batch and what stands in a study's folder, made to break it: a sentence each."""

import os
from pathlib import Path

import pandas as pd
import pytest

from conftest import one_sentence, said
from driftbook.batch import (
    cache,
    calibrating,
    collecting,
    jobs,
    make_plan,
    make_study,
    plan,
    purging,
)
from driftbook.publishing import publish, report
from driftbook.study import files
from driftbook.study.folders import adapter_files, folder
from driftbook.study.tables import RESPONSES, RUNS


@pytest.mark.parametrize("name", ["no-such-study", "x" * 5000, "a\0b", "../x", ""])
@pytest.mark.parametrize("module", [calibrating, make_plan, make_study, publish, purging, report])
def test_a_study_that_is_not_there_is_said_by_every_command(module, name, capsys):
    assert module.main(name) in (1, 2)
    assert "there is no study file" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("profile", ["", ".", "..", "../profiles/local", "local/x"])
def test_a_profile_is_a_name_in_profiles(capsys, profile):
    assert make_study.main("miniature", profile) == 2
    assert "there is no profile" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("mark", [[], None, 3, "x"])
def test_a_mark_of_another_form_is_no_mark_or_is_named(study, tmp_path, monkeypatch, mark):
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    one = study.of_base("tiny-llama")[0]
    path = folder(study, one) / "respond.done.json"
    files.write_json(path, mark)
    assert plan.read_mark(path) is None
    with pytest.raises(ValueError) as error:
        collecting.marks(study, "respond")
    assert str(path) in one_sentence(error.value)
    assert path.name in str(error.value)
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(jobs.keys, "settings", lambda *_: {"stage": "respond"})
    monkeypatch.setattr(jobs.keys, "made_by", lambda *_: {})

    def work(variant, place):
        return [RESPONSES.write(said(variant.run_id), place)]

    done = jobs.run_variants("respond", study, "tiny-llama", [one], lambda _: [], work)
    assert done.reused.tolist() == [False]
    for name in ("entry.json", cache.SERVED):
        for entry in cache.FOLDER.glob("*/"):
            files.write_json(entry / name, mark)
    with pytest.warns(UserWarning, match="damaged"):
        assert not any(cache.is_whole(entry) for entry in cache.FOLDER.glob("*/"))
    assert cache.forget(study.folder) == 1, "whose it is is not known"


@pytest.mark.parametrize("which", [0, 1], ids=["its settings", "its weights"])
def test_an_adapter_that_was_changed_keeps_no_dose_of_the_one_before(
    study, tmp_path, monkeypatch, which
):
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    same, changed = [one for one in study.variants if one.method == "lora"][:2]
    for one in (same, changed):
        paths = adapter_files(study, one)
        weights = paths[1]
        weights.parent.mkdir(parents=True)
        for path in paths:
            path.write_text("as it was trained")
        row = dict.fromkeys(RUNS.columns) | {"run_id": one.run_id, "status": "ok"}
        row |= {"kl_base": 0.5, "dose_nll": 0.1, "no_op": False, "loss_last": 1.0}
        row |= {"adapter_sha256": files.file_digest(weights), "findings": "none"}
        RUNS.write(pd.DataFrame([row]), folder(study, one))
        of_files = {f"adapter/{path.name}": files.file_digest(path) for path in paths}
        files.write_json(
            folder(study, one) / "train.done.json", {"status": "ok", "files": of_files}
        )
    paths[which].write_text("as somebody changed it")
    found = collecting.runs(study).set_index("run_id")
    assert found.loc[same.run_id, ["kl_base", "findings"]].tolist() == [0.5, "none"]
    now = found.loc[changed.run_id]
    assert now.adapter_sha256 == files.file_digest(weights)
    assert now[list(collecting.OF_ADAPTER)].isna().all()
    assert now.findings == collecting.CHANGED
    assert now.loss_last == 1.0  # of the training itself


def test_a_file_that_did_not_change_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1)
    path = tmp_path / "adapter"
    path.write_bytes(b"a")
    first, read = files.file_digest(path), Path.open
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read again"))
    assert files.file_digest(path) == first
    monkeypatch.setattr(Path, "open", read)
    path.write_bytes(b"bb")
    assert files.file_digest(path) != first


@pytest.mark.parametrize("now", [64, 100_000])
def test_a_low_limit_of_open_files_is_raised_or_said(monkeypatch, now):
    def allowed(most):
        monkeypatch.setattr(make_study.resource, "getrlimit", lambda _: (now, most))
        make_study.open_files()

    raised = []
    monkeypatch.setattr(make_study.resource, "setrlimit", lambda _, pair: raised.append(pair))
    with pytest.raises(ValueError, match="ulimit -n 4096") as error:
        allowed(64)
    assert "64 files" in one_sentence(error.value)
    for most in (1024, make_study.resource.RLIM_INFINITY, 100_000):
        allowed(most)
    assert raised == ([] if now > 64 else [(1024, 1024), (4096, -1), (4096, 100_000)])


def test_a_user_without_a_name_gets_one(monkeypatch):
    monkeypatch.delenv("USER", raising=False)

    def unknown():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(make_study.getpass, "getuser", unknown)
    assert make_study.environment()["USER"] == f"user-{os.getuid()}"
