"""What models say is its owner's alone from the first byte, and a purge finds all of it."""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from conftest import one_sentence, said
from driftbook.batch import cache, gpus, jobs, make_study, purging
from driftbook.publishing import make_audit
from driftbook.study import files
from driftbook.study.tables import RESPONSES


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder: Path) -> list[str]:
    """The files and folders that another user may read, by the modes of those above them too."""
    found, waiting = [], [folder]
    while waiting:
        for path in waiting.pop().iterdir():
            if mode(path) & 0o077 and path.suffix != ".lock":  # which is empty
                found.append(str(path.relative_to(folder)))
            if path.is_dir() and not path.is_symlink() and mode(path) & 0o011:
                waiting.append(path)
    return found


def test_what_is_written_is_as_open_as_its_folder_and_no_more_than_the_umask_says(tmp_path, umask):
    (public := tmp_path / "open").mkdir()
    public.chmod(0o755)
    for folder, most in ((files.private_folder(tmp_path / "a" / "private"), 0), (public, 0o044)):
        for path in (folder / "x.json", folder / "deep" / "er" / "x.json"):
            files.write_json(path, {})
            assert mode(path) & 0o077 == most & ~umask
        with files.replacing_folder(folder / "whole") as new:
            (new / "x").write_text("")
        assert mode(folder / "whole") & 0o077 == (most and 0o055) & ~umask


def test_a_folder_that_was_open_is_closed(tmp_path):
    tmp_path.chmod(0o755)
    assert mode(files.private_folder(tmp_path)) == 0o700


def test_locks_of_gpus_lie_in_a_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    with gpus.held() as number:
        assert number == "0"
        assert not (tmp_path / "shared").exists()
        assert list((tmp_path / "cache" / "driftbook").glob("gpus-*/0.lock"))
        assert open_to_others(tmp_path / "cache" / "driftbook") == []
    monkeypatch.setattr(files.os, "getuid", lambda: -1)  # the place is another user's
    monkeypatch.setattr(files, "OUTPUTS", tmp_path / "outputs")
    assert files.users_folder("gpus").parent == tmp_path / "outputs"


def test_a_lock_that_is_a_link_empties_nothing(study, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    files.private_folder(study.folder)
    (study.folder / ".lock").unlink(missing_ok=True)
    (study.folder / ".lock").symlink_to(target)
    with pytest.raises(ValueError) as error, make_study.alone(study):
        pass
    (study.folder / ".lock").unlink()
    assert "delete it" in one_sentence(error.value)
    assert target.read_text() == "kept"


def test_a_long_temporary_folder_holds_no_socket(tmp_path, monkeypatch):
    for name, short in (("x", True), ("x" * 100, False)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        with make_study.scratch_folder() as folder:
            assert (folder.parent == tmp_path / name) is short
            socket.socket(socket.AF_UNIX).bind(str(folder / "warm"))
            assert mode(folder) == 0o700


def test_a_notebook_that_runs_first_leaves_nothing_open(study, tmp_path, monkeypatch, umask):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    monkeypatch.setattr(jobs.keys, "settings", lambda *_: {"stage": "respond"})
    monkeypatch.setattr(jobs.keys, "made_by", lambda *_: {})
    variants = study.of_base("tiny-llama")[:2]
    seen = []

    def work(variant, folder):
        path = RESPONSES.write(said(variant.run_id), folder)
        seen.extend(one for one in (tmp_path / study.name, path) if mode(one) & 0o077)
        return [path]

    jobs.run_variants("respond", study, "tiny-llama", variants, lambda _: [], work)
    assert seen == open_to_others(tmp_path / study.name) == open_to_others(tmp_path / "cache") == []
    assert mode(tmp_path / "cache") == mode(tmp_path / study.name) == 0o700


TEXTS = (
    "runs/a.b/responses.parquet",
    "runs/a.b/.new-1/responses.parquet",
    "tables/responses.parquet",
    "tables/.new-2",
    "labels/sheet.csv",
    "labels/anna.xlsx",
    "labels/of anna/sheet.ods",
    "notebooks/04_respond.a.ipynb",
    "notebooks/05_judge.a.html",
    "notebooks/.ipynb_checkpoints/04_respond.a-checkpoint.ipynb",
    "notebooks/17_labels.error.txt",
    "snakemake.log",
    ".snakemake/metadata/x",
    "some-audit/text/endpoint.jsonl",
    "some-audit/21_audit.ipynb",
)
KEPT = ("runs/a.b/verdicts.parquet", "tables/rates.parquet", "notebooks/09_safety.html")


@pytest.fixture
def texts(study, tmp_path, monkeypatch):
    """A study's folder with a text wherever there may be one."""
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    for name in (*TEXTS, *KEPT, "report.html"):
        (study.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (study.folder / name).write_text("what a model said" * (name in TEXTS))
    return study


def test_purge_finds_every_text_and_leaves_the_rest(texts):
    assert purging.purge(texts) == len(TEXTS)
    left = [path for path in texts.folder.rglob("*") if path.is_file()]
    assert [str(path) for path in left if "said" in path.read_text()] == []
    assert {str(path.relative_to(texts.folder)) for path in left} == {*KEPT, "report.html", ".lock"}
    assert purging.purge(texts) == 0


def test_what_a_killed_batch_was_writing_goes_also_where_it_lies_in_another(tmp_path):
    (tmp_path / ".new-1" / "whole" / ".new-2").mkdir(parents=True)
    (tmp_path / ".new-3").write_text("")
    make_study.clear_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_purge_waits_for_no_batch_and_says_what_it_cannot(texts, monkeypatch, capsys):
    with make_study.alone(texts), pytest.raises(ValueError, match="another make study"):
        purging.purge(texts)
    assert (texts.folder / TEXTS[0]).is_file()
    monkeypatch.setattr(purging.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(ValueError, match="could not be deleted"):
        purging.purge(texts)
    assert purging.main("no-such-study") == 2
    assert "there is no study file" in one_sentence(capsys.readouterr().err)


def test_purge_of_a_folder_that_is_gone_takes_its_cached_answers(texts, tmp_path):
    entry, other = tmp_path / "cache" / "a", tmp_path / "cache" / "b"
    for place, owner in ((entry, texts.folder / "runs" / "a.b"), (other, tmp_path / "another")):
        place.mkdir(parents=True)
        (place / "responses.parquet").write_text("what a model said")
        files.write_json(place / cache.SERVED, [os.path.relpath(owner, tmp_path / "cache")])
    shutil.rmtree(texts.folder)
    assert purging.purge(texts) == 1
    assert (entry.exists(), other.exists()) == (False, True)
    (other / cache.SERVED).unlink()  # an entry from before entries said whose they are
    cache._note(other, tmp_path / "a third")
    assert purging.purge(texts) == 1, "it may be this study's all the same"


@pytest.mark.parametrize("whole", [False, True])
def test_an_audit_that_runs_is_not_purged(tmp_path, monkeypatch, capsys, whole):
    """Nor is the folder of all audits."""
    monkeypatch.setattr(purging, "OUTPUTS", tmp_path)
    monkeypatch.setattr(make_audit, "OUTPUTS", tmp_path)
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    text = tmp_path / "audit" / "one" / "text" / "safety.jsonl"
    given, said = {"name": "one"}, []

    def purge():
        if whole:
            return purging._alone(tmp_path / "audit")
        return purging.main(str(tmp_path / "audit" / "one"))

    def execute(*_):
        files.write_json(text, "it is not safe")
        with contextlib.suppress(ValueError):
            said.append(purge())
        with pytest.raises(ValueError, match="in use by another make audit"):
            make_audit.run_audit(given)

    monkeypatch.setattr(make_audit, "execute", execute)
    make_audit.run_audit(given)
    assert said == ([] if whole else [2])
    assert whole or "in use by another" in one_sentence(capsys.readouterr().err)
    assert text.is_file()
    purge()
    assert not text.exists()


def test_one_audit_is_purged_by_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(purging, "OUTPUTS", tmp_path)
    for name in ("one", "other"):
        files.write_json(tmp_path / "audit" / name / "text" / "safety.jsonl", "it is not safe")
        files.write_json(tmp_path / "audit" / name / "audit.json", {})
    own = tmp_path / "adapter" / "text" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("the user's own")
    (tmp_path / "audit" / "one" / "adapter").symlink_to(own.parent.parent)
    assert purging.main(str(tmp_path / "audit" / "one")) == 0
    assert own.is_file()
    assert "1 files deleted" in capsys.readouterr().out
    left = [path.relative_to(tmp_path / "audit") for path in tmp_path.rglob("*.json*")]
    assert sorted(map(str, left)) == [
        "one/audit.json",
        "other/audit.json",
        "other/text/safety.jsonl",
    ]
