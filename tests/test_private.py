"""What models say is its owner's alone from the first byte, whatever the umask, and can be purged."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import one_sentence
from driftbook.batch import gpus, make_study
from driftbook.study import files


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
            if mode(path) & 0o077:
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


SERVED = """
import os, socket, sys, tempfile
from pathlib import Path
from driftbook.batch import make_study
make_study._wait_for = lambda path, server: print(len(os.fsencode(path)))
make_study.gpus.numbers = lambda: []
with make_study.warm_kernels(dict(os.environ), Path(sys.argv[1])) as told:
    socket.socket(socket.AF_UNIX).bind(told["DRIFTBOOK_WARM"])
    print(oct(os.stat(Path(told["DRIFTBOOK_WARM"]).parent).st_mode & 0o777))
"""


def test_a_long_temporary_folder_holds_no_socket(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    said = subprocess.run(
        [sys.executable, "-c", SERVED, str(tmp_path / "log")],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    length, closed = said.stdout.split() or pytest.fail(said.stderr[-500:])
    assert int(length) <= 107
    assert closed == "0o700"
